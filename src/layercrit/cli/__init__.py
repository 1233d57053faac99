"""The command line."""

from layercrit.cli.root import cli, main

__all__ = ["cli", "main"]
