"""The figure of criticality over depth: a line with a band for each category."""
