"""Run resets fast and exactly: one opened model, one probe set, every layer reset in turn."""
