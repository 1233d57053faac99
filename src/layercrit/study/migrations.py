"""The schema of a study's file, as the steps that bring an older file to it."""

import sqlite3
from collections.abc import Iterator

__all__ = ["MIGRATIONS", "statements"]

# One step per schema version, applied in order to files that are older. A released step is never edited.
MIGRATIONS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE models (
        model TEXT PRIMARY KEY, position INTEGER NOT NULL, reference TEXT NOT NULL, category TEXT, label TEXT,
        documented_accuracy REAL, record TEXT
    );
    CREATE TABLE plan (
        model TEXT NOT NULL, layer TEXT NOT NULL, reset TEXT NOT NULL, trial INTEGER NOT NULL, key TEXT NOT NULL,
        type TEXT, stage TEXT, depth INTEGER NOT NULL, n_parameters INTEGER, flops_after REAL,
        PRIMARY KEY (model, reset, trial, layer)
    ) WITHOUT ROWID;
    CREATE INDEX plan_by_key ON plan (key);
    CREATE TABLE runs (run INTEGER PRIMARY KEY, started TEXT NOT NULL, record TEXT NOT NULL);
    CREATE TABLE cells (
        key TEXT PRIMARY KEY, status TEXT NOT NULL, seed TEXT, delta_norm REAL, n_images INTEGER, means TEXT NOT NULL,
        per_image BLOB, raw TEXT, seconds REAL, finished TEXT, run INTEGER REFERENCES runs (run)
    );
    CREATE TABLE parts (
        task TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL, seconds REAL NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (task, start)
    );
    CREATE TABLE failures (
        model TEXT NOT NULL, reset TEXT NOT NULL, trial INTEGER NOT NULL, error TEXT NOT NULL, details TEXT NOT NULL,
        at TEXT NOT NULL, PRIMARY KEY (model, reset, trial)
    );
    """,
    """
    ALTER TABLE plan ADD COLUMN shape TEXT;
    ALTER TABLE models ADD COLUMN attack_norm TEXT;
    ALTER TABLE models ADD COLUMN eps REAL;
    """,
    # the backend was called a road
    """
    UPDATE models SET record = json_set(
        json_remove(record, '$.road'), '$.backend',
        CASE json_extract(record, '$.road') WHEN 'graph' THEN 'exported graph' WHEN 'recorded' THEN 'recorded outputs'
            ELSE 'plain' END
    ) WHERE json_extract(record, '$.road') IS NOT NULL;
    """,
    # rows whose bits flipped on the disk are told by their checksums; older rows have none
    """
    ALTER TABLE meta ADD COLUMN checksum INTEGER;
    CREATE TRIGGER meta_checksum AFTER INSERT ON meta BEGIN
        UPDATE meta SET checksum = checksum(
            NEW.name, NEW.value
        ) WHERE rowid = NEW.rowid;
    END;
    ALTER TABLE models ADD COLUMN checksum INTEGER;
    CREATE TRIGGER models_checksum AFTER INSERT ON models BEGIN
        UPDATE models SET checksum = checksum(
            NEW.model, NEW.position, NEW.reference, NEW.category, NEW.label, NEW.documented_accuracy,
            NEW.attack_norm, NEW.eps, NEW.record
        ) WHERE rowid = NEW.rowid;
    END;
    ALTER TABLE plan ADD COLUMN checksum INTEGER;
    CREATE TRIGGER plan_checksum AFTER INSERT ON plan BEGIN
        UPDATE plan SET checksum = checksum(
            NEW.model, NEW.layer, NEW.reset, NEW.trial, NEW.key, NEW.type, NEW.stage, NEW.depth, NEW.n_parameters,
            NEW.flops_after, NEW.shape
        ) WHERE model = NEW.model AND reset = NEW.reset AND trial = NEW.trial AND layer = NEW.layer;
    END;
    ALTER TABLE runs ADD COLUMN checksum INTEGER;
    CREATE TRIGGER runs_checksum AFTER INSERT ON runs BEGIN
        UPDATE runs SET checksum = checksum(
            NEW.started, NEW.record
        ) WHERE rowid = NEW.rowid;
    END;
    ALTER TABLE cells ADD COLUMN checksum INTEGER;
    CREATE TRIGGER cells_checksum AFTER INSERT ON cells BEGIN
        UPDATE cells SET checksum = checksum(
            NEW.key, NEW.status, NEW.seed, NEW.delta_norm, NEW.n_images, NEW.means, NEW.per_image, NEW.raw,
            NEW.seconds, NEW.finished
        ) WHERE rowid = NEW.rowid;
    END;
    ALTER TABLE parts ADD COLUMN checksum INTEGER;
    CREATE TRIGGER parts_checksum AFTER INSERT ON parts BEGIN
        UPDATE parts SET checksum = checksum(
            NEW.task, NEW.start, NEW.stop, NEW.seconds, NEW.data
        ) WHERE rowid = NEW.rowid;
    END;
    ALTER TABLE failures ADD COLUMN checksum INTEGER;
    CREATE TRIGGER failures_checksum AFTER INSERT ON failures BEGIN
        UPDATE failures SET checksum = checksum(
            NEW.model, NEW.reset, NEW.trial, NEW.error, NEW.details, NEW.at
        ) WHERE rowid = NEW.rowid;
    END;
    CREATE TRIGGER record_checksum AFTER UPDATE OF record ON models BEGIN
        UPDATE models SET checksum = checksum(
            NEW.model, NEW.position, NEW.reference, NEW.category, NEW.label, NEW.documented_accuracy,
            NEW.attack_norm, NEW.eps, NEW.record
        ) WHERE rowid = NEW.rowid;
    END;
    """,
    # a model may be measured at several epochs, on several probe sets, and with several kinds of norm statistics
    """
    ALTER TABLE models ADD COLUMN variant_of TEXT;
    ALTER TABLE models ADD COLUMN epoch INTEGER;
    ALTER TABLE models ADD COLUMN probe_set TEXT;
    ALTER TABLE models ADD COLUMN norm_statistics TEXT;
    DROP TRIGGER models_checksum;
    CREATE TRIGGER models_checksum AFTER INSERT ON models BEGIN
        UPDATE models SET checksum = checksum(
            NEW.model, NEW.position, NEW.reference, NEW.category, NEW.label, NEW.documented_accuracy,
            NEW.attack_norm, NEW.eps, NEW.record, NEW.variant_of, NEW.epoch, NEW.probe_set, NEW.norm_statistics
        ) WHERE rowid = NEW.rowid;
    END;
    DROP TRIGGER record_checksum;
    CREATE TRIGGER record_checksum AFTER UPDATE OF record ON models BEGIN
        UPDATE models SET checksum = checksum(
            NEW.model, NEW.position, NEW.reference, NEW.category, NEW.label, NEW.documented_accuracy,
            NEW.attack_norm, NEW.eps, NEW.record, NEW.variant_of, NEW.epoch, NEW.probe_set, NEW.norm_statistics
        ) WHERE rowid = NEW.rowid;
    END;
    """,
)


def statements(step: str) -> Iterator[str]:
    """Yield the SQL statements of a step; a trigger has statements of its own."""
    statement = ""
    for part in step.split(";")[:-1]:
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
