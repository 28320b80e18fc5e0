"""Which runs a file holds and how far each has come, on disk: a file of any length needs the same memory."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator


class RunLedger:
    """Tenant and next ordinal by run, in a private temporary database that vanishes with its connection."""

    def __init__(self) -> None:
        # An empty name is SQLite's own temporary file: it spills to disk and leaves nothing behind.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute(
            "CREATE TABLE run(run_id TEXT PRIMARY KEY, tenant_id TEXT, ordinal INTEGER NOT NULL) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def start(self, run_id: str, tenant_id: str) -> str | None:
        """Note the run's tenant, and return the tenant with which it was started before, if it was."""
        found = self.tenant(run_id)
        if found is None:
            self._db.execute(
                "INSERT INTO run VALUES(?, ?, 0) ON CONFLICT(run_id) DO UPDATE SET tenant_id = excluded.tenant_id",
                (run_id, tenant_id),
            )
        return found

    def tenant(self, run_id: str) -> str | None:
        """Return the tenant of a run that was started, else ``None``."""
        row = self._db.execute("SELECT tenant_id FROM run WHERE run_id = ?", (run_id,)).fetchone()
        return None if row is None else row[0]

    def next_ordinal(self, run_id: str) -> int:
        """Count one more operation of the run; the first is 1."""
        row = self._db.execute(
            "INSERT INTO run VALUES(?, NULL, 1) "
            "ON CONFLICT(run_id) DO UPDATE SET ordinal = ordinal + 1 RETURNING ordinal",
            (run_id,),
        ).fetchone()
        return int(row[0])

    def touch(self, run_id: str) -> None:
        """Note that the file names the run."""
        self._db.execute("INSERT INTO run VALUES(?, NULL, 0) ON CONFLICT(run_id) DO NOTHING", (run_id,))

    def run_ids(self) -> Iterator[str]:
        """Every run seen, in the order of their ids."""
        for (run_id,) in self._db.execute("SELECT run_id FROM run ORDER BY run_id"):
            yield run_id

    def close(self) -> None:
        """Forget everything."""
        self._db.close()
