"""The schema, as numbered steps. Append only: a step that was ever released is never edited.

A row is a record of `posada.model.records` as JSON in ``data``, plus the few columns that queries need. The JSON is the
truth; the columns are written with it.
"""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE vms (uuid TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
           ephemeral INTEGER NOT NULL, data BLOB NOT NULL)""",
        "CREATE INDEX vms_ephemeral ON vms (uuid) WHERE ephemeral",
        """CREATE TABLE snapshots (id TEXT PRIMARY KEY, vm TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL,
           data BLOB NOT NULL, UNIQUE (vm, name))""",
        "CREATE TABLE layers (id TEXT PRIMARY KEY, data BLOB NOT NULL)",
        "CREATE TABLE images (digest TEXT PRIMARY KEY, created REAL NOT NULL, data BLOB NOT NULL)",
        """CREATE TABLE operations (id TEXT PRIMARY KEY, state TEXT NOT NULL, target TEXT NOT NULL,
           created REAL NOT NULL, cancel INTEGER NOT NULL DEFAULT 0, data BLOB NOT NULL)""",
        "CREATE INDEX operations_open ON operations (created) WHERE state IN ('pending', 'running')",
        "CREATE INDEX operations_created ON operations (created)",
        """CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL,
           vm TEXT, name TEXT, data BLOB NOT NULL)""",
    ),
)
