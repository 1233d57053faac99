"""Run resets fast and exactly: one opened model, one probe set, each layer reset in turn."""
