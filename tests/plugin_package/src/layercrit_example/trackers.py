import json

import layercrit
from layercrit.trackers import Tracker, metric_of


@layercrit.tracker("lines")
class Lines(Tracker):
    """Lines of JSON: a file cells.jsonl in the run's folder, with a line for each cell."""

    def begin(self, name, config, folder):
        """Open the file, of an earlier run as well."""
        self.file = (folder / "cells.jsonl").open("a", encoding="utf-8")
        return f"{folder / 'cells.jsonl'}"

    def cell(self, row):
        """Write a line."""
        self.file.write(json.dumps({metric_of(row): round(row["cosine"], 3), "trial": row["trial"]}) + "\n")

    def end(self, ok):
        """Close the file."""
        self.file.close()
