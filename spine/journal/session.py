"""The one writing connection of a process: its transactions, its statements, and whose fault an error is."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, Final

from sqlalchemy import Engine, text

from spine.governance.units import Write
from spine.journal.batch import Head
from spine.journal.chain import STREAM
from spine.journal.engine import (
    Target,
    check_version,
    prepare_schema,
    raw_connection,
    stored_version,
    writing_engine,
)
from spine.journal.faults import CommitUnknown, StorageError, UnitFault, is_unit
from spine.journal.files import NamedFile
from spine.journal.oslock import FileLock
from spine.journal.processes import closed, opened
from spine.journal.statements import Params, Placeholder, Statement, insert
from spine.journal.tables import metadata
from spine.journal.written_tables import targets

_JOURNAL: Final = insert("journal", 0, "journal row", "stream seq prev hash body kind unit run_id tenant_id ref")
# How many rows a text may hold: four sizes for each doubling.
_ROOMS: Final = (*range(1, 9), *(base * step for base in (2, 4, 8, 16, 32, 64, 128) for step in (5, 6, 7, 8)))
_WRITE_VERBS: Final = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE", "MERGE", "WITH"})
_SCHEMA: Final = {
    "sqlite": "SELECT 'main'",
    "postgresql": "SELECT nspname FROM pg_namespace n JOIN pg_class c ON relnamespace = n.oid "
    "WHERE c.oid = 'journal'::regclass",
}
_COMPILED_MAX: Final = 1_000
_RESTART_FACTOR: Final = 8
_IMPATIENT_MS: Final = 100


class Session:
    """A connection that lives in one thread. Every method may raise the driver's errors; see ``faults``."""

    def __init__(self, target: Target, busy_timeout_ms: int) -> None:
        self.target = target
        self._busy_timeout_ms = busy_timeout_ms
        self._placeholder: Placeholder = "?" if target.dialect == "sqlite" else "%s"
        self._begin = "BEGIN IMMEDIATE" if target.dialect == "sqlite" else "BEGIN"
        self._for_update = "" if target.dialect == "sqlite" else " FOR UPDATE"
        self._opened = False
        self._engine: Engine | None = None
        self._connection: Any = None
        self._lock: FileLock | None = None
        self._file: NamedFile | None = None
        self._schema = ""
        self._texts: dict[tuple[Statement, int, bool], str] = {}
        self._compiled: dict[str, tuple[str, Sequence[str] | None]] = {}
        p = self._placeholder
        self._move_head = (
            f"UPDATE journal_head SET size = {p}, hash = {p} WHERE stream = '{STREAM}' AND size = {p} AND hash = {p}"
        )

    @property
    def connected(self) -> bool:
        """Whether there is a connection to use."""
        return self._connection is not None

    def connect(self, *, create: bool) -> None:
        """Open the connection; with ``create`` the schema is made if there is none, else it must be there."""
        if self._engine is not None:
            self._engine.dispose()
        if self.target.path is not None and not self._opened:
            opened(self.target.path)
            self._opened = True
        if self._file is not None:
            self._file.check()
        self._engine = writing_engine(self.target, busy_timeout_ms=self._busy_timeout_ms, create=create)
        if create:
            prepare_schema(self._engine, self.target)
        connection = raw_connection(self._engine, self.target)
        try:
            if not create:
                check_version(stored_version(connection, self.target), self.target)
            self._schema = str(connection.execute(_SCHEMA[self.target.dialect]).fetchone()[0]).lower()
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        if self.target.path is not None and create:
            self._file = NamedFile(self.target.path)
            self._file.check()
            self._lock = FileLock(self.target.path.with_name(self.target.path.name + "-spine.lock"))

    def discard(self) -> None:
        """Drop the connection, whatever state it is in."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        """Drop the connection and everything it was made from."""
        self.discard()
        if self._engine is not None:
            self._engine.dispose()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._opened and self.target.path is not None:
            closed(self.target.path)
            self._opened = False

    def begin(self) -> None:
        """Begin a transaction that others cannot write beside (SQLite) or that will lock the head (PostgreSQL)."""
        if self._file is not None:
            self._file.check()
            if self._lock is not None and not self._lock.share(self._busy_timeout_ms / 1000):
                raise StorageError("another process has been copying the log back for too long")
        self._connection.execute(self._begin)

    def commit(self) -> None:
        """Make the transaction durable; raise CommitUnknown when the database does not say whether it is."""
        try:
            self._connection.execute("COMMIT")
        except Exception as error:
            undecided = self.target.dialect == "sqlite" and self._connection.in_transaction
            if undecided or is_unit(error):
                raise
            raise CommitUnknown(str(error)) from error
        if self._lock is not None:
            self._lock.release()

    def rollback(self) -> None:
        """Undo the transaction, if there is one."""
        if self._lock is not None:
            self._lock.release()
        if self._connection is not None and self.in_transaction:
            self._connection.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open, failed ones included."""
        if self.target.dialect == "sqlite":
            return bool(self._connection.in_transaction)
        return bool(self._connection.info.transaction_status != 0)

    def read_head(self, *, lock: bool) -> Head:
        """Where the chain ends, and the epoch there; with ``lock`` until the transaction's end."""
        sql = f"SELECT size, hash FROM journal_head WHERE stream = '{STREAM}'"
        found = self._connection.execute(sql + (self._for_update if lock else "")).fetchone()
        # A statement of its own: on PostgreSQL it sees what was committed while the lock was waited for.
        state = self._connection.execute("SELECT epoch FROM governance WHERE id = 1").fetchone()
        if found is None or state is None:
            raise StorageError("the journal has lost its head or its governance row; run `spine verify`")
        return Head(found[0], bytes(found[1]), state[0])

    def move_head(self, old: Head, size: int, digest: bytes) -> bool:
        """Set the head if it still is ``old``; whether it was."""
        cursor = self._connection.execute(self._move_head, (size, digest, old.size, old.hash))
        return bool(cursor.rowcount == 1)

    def insert_rows(self, rows: Sequence[Params]) -> None:
        """Append journal rows."""
        found = self._run(_JOURNAL, rows)
        if found != len(rows):
            raise StorageError(
                f"journal row {rows[0][1]} or one after it exists already, though the head says otherwise; "
                "run `spine verify`"
            )

    def change(self, statement: Statement, rows: Sequence[Params]) -> None:
        """Run one statement of a projection for all its rows; raise UnitFault when its guard fails."""
        found = self._run(statement, rows)
        if found != len(rows):
            raise UnitFault(statement.guard, len(rows), found)

    def _run(self, statement: Statement, rows: Sequence[Params]) -> int:
        """Run ``statement`` for all ``rows`` in as few calls as possible; how many rows changed."""
        if not statement.many:
            cursor = self._connection.cursor()
            cursor.executemany(self._text(statement, 1), rows)
            return int(cursor.rowcount)
        found, at = 0, 0
        while at < len(rows):
            size, fill = self._fit(len(rows) - at)
            some = rows[at : at + size]
            values = list(chain.from_iterable(some))
            if fill:
                values += [None] * (fill * len(some[0]))
                if statement.undoes is None:
                    values.append(size)
            found += self._connection.execute(self._text(statement, size + fill, fill > 0), values).rowcount
            at += size
        return found

    def _fit(self, rows: int) -> tuple[int, int]:
        """How many of ``rows`` rows to run at once, and how many rows of room to leave, so that texts are few."""
        if self.target.dialect == "sqlite":
            # One call, even if it has room for more: each gives the interpreter up, and a busy loop keeps it for long.
            size = min(rows, _ROOMS[-1])
            return size, _ROOMS[bisect_left(_ROOMS, size)] - size
        return _ROOMS[bisect_right(_ROOMS, rows) - 1], 0

    def _text(self, statement: Statement, rows: int, room: bool = False) -> str:
        made = self._texts.get((statement, rows, room))
        if made is None:
            made = statement.room(rows) if room else statement.sql(rows, self._placeholder)
            self._texts[statement, rows, room] = made
        return made

    def write(self, write: Write) -> int:
        """Run a domain's own statement; the number of rows it changed."""
        sql, names = self._compile(write.sql)
        params: Any = dict(write.params) if names is None else [write.params[name] for name in names]
        if self.target.dialect == "postgresql":
            # Prepared, so that a text of several statements is refused: only the first one's verb was looked at.
            cursor = self._connection.execute(sql, params, prepare=True)
        else:
            cursor = self._connection.execute(sql, params)
        if cursor.description is not None:
            cursor.fetchall()
        if cursor.rowcount < 0:
            return int(self._connection.execute("SELECT changes()").fetchone()[0])
        return int(cursor.rowcount)

    def _compile(self, sql: str) -> tuple[str, Sequence[str] | None]:
        made = self._compiled.get(sql)
        if made is None:
            verb = sql.split(None, 1)[0].upper() if sql.strip() else ""
            if verb not in _WRITE_VERBS:
                raise ValueError(f"a commit takes {', '.join(sorted(_WRITE_VERBS))}, not {verb or 'nothing'}")
            for schema, table in targets(sql):
                if table in metadata.tables and schema in {"", self._schema}:
                    raise ValueError(f"table {table} is Spine's own: a domain writes to tables of its own")
            if self._engine is None:
                raise StorageError("the journal is closed")
            compiled: Any = text(sql).compile(dialect=self._engine.dialect)
            names = list(compiled.positiontup) if compiled.positional else None
            if len(self._compiled) >= _COMPILED_MAX:
                self._compiled.clear()
            made = self._compiled[sql] = (str(compiled), names)
        return made

    def execute(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Run a statement written with ``?`` and return its rows, if it has any."""
        cursor = self._connection.execute(sql.replace("?", self._placeholder), params)
        return list(cursor.fetchall()) if cursor.description is not None else []

    def checkpoint(self, pages: int) -> bool:
        """Copy the log of an SQLite database back, if no other process writes; whether that was so.

        It waits for nobody, until the log is longer than several times ``pages`` because somebody always reads.
        """
        if self._lock is None or self._connection is None:
            return True
        if not self._lock.own():
            return False
        try:
            _, log, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if log > pages * _RESTART_FACTOR and copied == log:
                self._restart_log()
        finally:
            self._lock.release()
        return True

    def _restart_log(self) -> None:
        with self.impatient():
            self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Wait hardly at all for another process's lock on an SQLite database: commits must not wait behind this."""
        if self.target.dialect != "sqlite":
            yield
            return
        self._connection.execute(f"PRAGMA busy_timeout={_IMPATIENT_MS}")
        try:
            yield
        finally:
            if self._connection is not None:
                self._connection.execute(f"PRAGMA busy_timeout={self._busy_timeout_ms}")
