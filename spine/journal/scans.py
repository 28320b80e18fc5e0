"""Long readings of the journal: a few connections of their own, opened when first used, never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qsl
from weakref import WeakSet

import anyio
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from spine.journal.engine import (
    FIND_META,
    READ_VERSION,
    Target,
    check_version,
    lenient,
    postgresql_settings,
    read_only_uri,
    unavailable,
)
from spine.journal.faults import StorageError
from spine.journal.files import NamedFile
from spine.journal.processes import closed, opened
from spine.kernel.errors import JournalUnavailable

_CLOSE_S: Final = 2.0
_READ_S: Final = 10.0


class Scans:
    """Reads what may be long, beside the short lookups, on SQLAlchemy's asynchronous engine; raises JournalError."""

    def __init__(self, target: Target, file: NamedFile | None, checked: Callable[[], Awaitable[None]]) -> None:
        self._target = target
        self._checked = checked
        self._engine: AsyncEngine | None = None
        self._file = file
        self._opening = asyncio.Lock()
        self._reading: set[asyncio.Task[list[Any]]] = set()
        self._connections: WeakSet[Any] = WeakSet()
        self._placeholder = "?" if self._target.dialect == "sqlite" else "%s"

    async def _open(self) -> AsyncEngine:
        async with self._opening:
            if self._engine is None:
                if self._target.path is not None:
                    opened(self._target.path)
                try:
                    if self._file is not None:
                        # A lookup tells what is wrong there, before the pool opens anything.
                        await self._checked()
                    self._engine = await self._connect()
                except BaseException:
                    self._closed()
                    raise
            return self._engine

    def _check_file(self) -> None:
        """An answer must not come out of a file that has lost its name."""
        if self._file is None:
            return
        try:
            self._file.check()
        except StorageError as error:
            raise unavailable(self._target, error) from error

    def _closed(self) -> None:
        if self._target.path is not None:
            closed(self._target.path)

    async def _connect(self) -> AsyncEngine:
        engine = _engine(self._target, self._connections)
        try:
            async with engine.connect() as connection:
                found = (await connection.exec_driver_sql(FIND_META[self._target.dialect])).scalar()
                stored = (await connection.exec_driver_sql(READ_VERSION)).scalar() if found is not None else None
            check_version(None if stored is None else int(stored), self._target)
        except SQLAlchemyError as error:
            await engine.dispose()
            raise unavailable(self._target, error) from error
        except BaseException:
            await engine.dispose()
            raise
        return engine

    async def close(self) -> None:
        """Close its connections, interrupting what takes too long; reading again opens new ones."""
        if self._reading:
            # What is still being opened has no engine to dispose of yet, and a pool forgets what is out when it goes.
            _, running = await asyncio.wait(list(self._reading), timeout=_CLOSE_S)
            if running:
                with anyio.move_on_after(_CLOSE_S):
                    await self._interrupt()
                await asyncio.wait(running, timeout=_CLOSE_S)
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()
            self._closed()

    async def _interrupt(self) -> None:
        for connection in list(self._connections):
            await (connection.interrupt() if self._target.dialect == "sqlite" else connection.cancel_safe())

    async def rows(self, sql: str, params: tuple[Any, ...]) -> list[Any]:
        """The rows of a query written with ``?``."""
        # In a task of its own: a caller that is cancelled in the middle of a query must leave no connection behind,
        # whose thread would answer a loop that may be closed by then.
        reading = asyncio.create_task(self._twice(sql, params), name="spine.journal.read")
        self._reading.add(reading)
        reading.add_done_callback(self._read_ended)
        return await asyncio.shield(reading)

    def _read_ended(self, reading: asyncio.Task[list[Any]]) -> None:
        self._reading.discard(reading)
        if not reading.cancelled():
            # Seen, even when its caller is gone.
            reading.exception()

    async def _twice(self, sql: str, params: tuple[Any, ...]) -> list[Any]:
        try:
            return await self._read(sql, params)
        except SQLAlchemyError as error:
            if not (isinstance(error, DBAPIError) and error.connection_invalidated):
                raise unavailable(self._target, error) from error
        # The server dropped a connection that lay in the pool: reading again does no harm.
        try:
            return await self._read(sql, params)
        except SQLAlchemyError as error:
            raise unavailable(self._target, error) from error

    async def _read(self, sql: str, params: tuple[Any, ...]) -> list[Any]:
        engine = self._engine or await self._open()
        self._check_file()
        try:
            with anyio.fail_after(_READ_S):
                async with engine.connect() as connection:
                    try:
                        self._check_file()
                    except JournalUnavailable:
                        # It may have been opened to the other file.
                        await connection.invalidate()
                        raise
                    result = await connection.exec_driver_sql(sql.replace("?", self._placeholder), params or None)
                    return list(result.all())
        except TimeoutError as error:
            raise unavailable(self._target, error) from error


def _engine(target: Target, connections: WeakSet[Any]) -> AsyncEngine:
    if target.dialect == "postgresql":
        engine = create_async_engine(target.url, isolation_level="AUTOCOMMIT", pool_size=4, max_overflow=0)
        settings = postgresql_settings(lock_timeout_ms=5_000, read_only=True)
    else:
        uri, _, query = read_only_uri(target).partition("?")
        url = URL.create("sqlite+aiosqlite", database=uri, query={**dict(parse_qsl(query)), "uri": "true"})
        engine = create_async_engine(url, pool_size=4, max_overflow=0)
        settings = ["PRAGMA query_only=ON"]

    @event.listens_for(engine.sync_engine, "connect")
    def _settings(connection: Any, _record: object) -> None:
        connections.add(connection.driver_connection)
        if target.dialect == "sqlite":
            connection.driver_connection.text_factory = lenient
        cursor = connection.cursor()
        for setting in settings:
            cursor.execute(setting)
        cursor.close()

    return engine
