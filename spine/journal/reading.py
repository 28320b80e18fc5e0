"""Reading the journal beside its writer: lookups in a thread of their own, and long scans that hold up none of them."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, Final

from spine.governance.params import text_problem
from spine.journal.engine import Target, parse_url, unavailable
from spine.journal.files import NamedFile
from spine.journal.readonly import ReadOnly
from spine.journal.scans import Scans
from spine.journal.thread import Worker

_CLOSE_S: Final = 1.0
_READ_S: Final = 10.0
# So many lookups that wait at the same time are answered at the same time.
_TOGETHER: Final = 32


class _Lookups:
    """A thread that answers queries one after the other; it is started when it is first asked."""

    def __init__(self, target: Target, file: NamedFile | None) -> None:
        self._target = target
        self._file = file
        self._opened: tuple[Worker, ReadOnly] | None = None

    def _open(self) -> tuple[Worker, ReadOnly]:
        worker = Worker("journal reader", together=_TOGETHER)
        worker.start()
        self._opened = worker, ReadOnly(self._target, self._file, _READ_S)
        return self._opened

    async def open(self) -> None:
        worker, connection = self._opened or self._open()
        try:
            await worker.call(connection.connect, within_s=_READ_S)
        except TimeoutError as error:
            raise unavailable(self._target, error) from error

    async def rows(self, sql: str, params: tuple[Any, ...]) -> list[Any]:
        """The rows, or JournalError; a caller that is cancelled leaves the query to the thread."""
        worker, connection = self._opened or self._open()
        until = time.monotonic() + _READ_S
        try:
            return await worker.call(partial(connection.rows, sql, params, until), within_s=_READ_S)
        except TimeoutError as error:
            raise unavailable(self._target, error) from error

    async def close(self) -> None:
        """Answer what waits, then disconnect and end the thread; what takes too long is given up."""
        opened, self._opened = self._opened, None
        if opened is None:
            return
        worker, connection = opened
        stopping = asyncio.ensure_future(worker.stop(connection.close))
        ended, _ = await asyncio.wait([stopping], timeout=_CLOSE_S)
        if not ended:
            connection.interrupt()
            ended, _ = await asyncio.wait([stopping], timeout=_CLOSE_S)
        if not ended:
            # The database does not even let go: its thread is a daemon, and disconnects when it comes back.
            stopping.cancel()


class Reading:
    """Connections to one database that cannot write; every method may raise JournalError."""

    def __init__(self, url: str) -> None:
        self._target = parse_url(url)
        # One for all its connections: until they are closed, no answer comes out of another file.
        self._file = None if self._target.path is None else NamedFile(self._target.path)
        self._lookups = _Lookups(self._target, self._file)
        self._scans = Scans(self._target, self._file, self._lookups.open)

    async def open(self) -> None:
        """Connect and check the schema's version; reading does it when it was not done before.

        Raises JournalUnavailable, and SchemaMismatch when the database holds no journal or another version of it.
        """
        await self._lookups.open()

    async def close(self) -> None:
        """Close its connections; reading again opens new ones."""
        closing = [asyncio.create_task(part.close()) for part in (self._lookups, self._scans)]
        # They go on even when nobody waits for it any more.
        await asyncio.wait(closing)
        if self._file is not None:
            self._file.forget()
        for ended in closing:
            ended.result()

    async def _all(self, sql: str, *params: Any) -> list[Any]:
        """The rows of a lookup: a query that is short however long the journal is."""
        return [] if _held_by_none(params) else await self._lookups.rows(sql, params)

    async def _scan(self, sql: str, *params: Any) -> list[Any]:
        """The rows of a query that may be long, and holds up no lookup."""
        return [] if _held_by_none(params) else await self._scans.rows(sql, params)


def _held_by_none(params: tuple[Any, ...]) -> bool:
    """Whether no row can hold one of these values: the drivers raise on text that is not Unicode."""
    return any(isinstance(value, str) and text_problem(value) for value in params)
