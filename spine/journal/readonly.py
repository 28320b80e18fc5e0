"""A connection that cannot write, for one thread: a query in, its rows out, and a JournalError where there are none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, Final

from sqlalchemy import Engine

from spine.journal.engine import (
    Target,
    check_version,
    lenient,
    raw_connection,
    reading_engine,
    stored_version,
    unavailable,
)
from spine.journal.faults import is_database, is_passing
from spine.journal.files import NamedFile
from spine.journal.processes import closed, opened
from spine.kernel.errors import JournalError

# How many steps SQLite makes between two looks at the clock: some milliseconds.
_STEPS: Final = 100_000


class ReadOnly:
    """Connects when it is first asked, and again after an error; never to another file than ``file``.

    ``query_s`` seconds bound what PostgreSQL works on one query.

    Every method but ``interrupt`` belongs to the thread that asks first.
    """

    def __init__(self, target: Target, file: NamedFile | None, query_s: float) -> None:
        self._target = target
        self._query_s = query_s
        sqlite = target.dialect == "sqlite"
        self._placeholder = "?" if sqlite else "%s"
        # Without parameters PostgreSQL's driver leaves a per cent sign alone.
        self._nothing: tuple[()] | None = () if sqlite else None
        self._connection: Any = None
        self._file = file
        self._until = 0.0
        self._interrupted = False

    def connect(self) -> None:
        """Connect and check the schema's version. Raises JournalUnavailable or SchemaMismatch."""
        try:
            self._connect()
            if self._file is not None:
                self._file.check()
        except JournalError:
            raise
        except Exception as error:
            raise unavailable(self._target, error) from error

    def rows(self, sql: str, params: Sequence[Any], until: float) -> list[Any]:
        """The rows of a query written with ``?``, given up at ``until`` (monotonic seconds).

        Raises JournalUnavailable, or SchemaMismatch when it had to connect.
        """
        self._until = until
        if self._over():
            raise unavailable(self._target, TimeoutError("the queries before this one took too long"))
        kept = self._connection is not None
        try:
            return self._rows(sql, params)
        except JournalError:
            raise
        except Exception as error:
            if not is_database(error):
                raise
            lost = kept and bool(getattr(self._connection, "closed", False))
            if not is_passing(error):
                self.close()
            if not lost:
                raise unavailable(self._target, error) from error
        # The server dropped a connection that lay idle: reading again does no harm.
        return self.rows(sql, params, until)

    def _rows(self, sql: str, params: Sequence[Any]) -> list[Any]:
        self._connect()
        if self._file is not None:
            # An answer must not come out of a file that has lost its name.
            self._file.check()
        cursor = self._connection.execute(sql.replace("?", self._placeholder), params or self._nothing)
        return list(cursor.fetchall())

    def _connect(self) -> None:
        if self._connection is not None:
            return
        path = self._target.path
        engine = reading_engine(self._target)
        if path is None or self._file is None:
            self._connection = self._made(engine)
            return
        self._file.check()
        opened(path)
        try:
            self._connection = self._made(engine)
        except BaseException:
            closed(path)
            raise

    def _made(self, engine: Engine) -> Any:
        connection = raw_connection(engine, self._target)
        try:
            check_version(stored_version(connection, self._target), self._target)
            if self._target.dialect == "sqlite":
                connection.text_factory = lenient
                connection.set_progress_handler(self._over, _STEPS)
            else:
                connection.execute(f"SET statement_timeout = {round(self._query_s * 1000)}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _over(self) -> bool:
        """Whether nobody waits for the query any more; SQLite then interrupts it."""
        return self._interrupted or time.monotonic() >= self._until

    def interrupt(self) -> None:
        """Give up what is asked and what will be; from any thread, and without waiting."""
        self._interrupted = True
        if self._target.dialect == "postgresql" and self._connection is not None:
            # The server is told over a connection that is made for it.
            Thread(target=_cancel, args=(self._connection,), daemon=True).start()

    def close(self) -> None:
        """Disconnect."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.close()
        if self._target.path is not None:
            closed(self._target.path)


def _cancel(connection: Any) -> None:
    with suppress(Exception):
        connection.cancel()
