"""A bare group-commit actor: callers hand it one row of 280 bytes each and wait until it is durable.

The same stack as the journal's and nothing else: an anyio stream, one writer thread, SQLAlchemy, SQLite (WAL, FULL).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from benchmarks.side import arguments, async_rate, report

ROW = "r" * 280
Item = tuple[str, "asyncio.Future[None]"]


def connect(path: Path) -> Connection:
    """One connection in WAL with synchronous=FULL, its transactions begun by hand."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def settings(dbapi: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        dbapi.isolation_level = None
        cursor = dbapi.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    connection = engine.connect()
    with connection.begin():
        connection.exec_driver_sql("CREATE TABLE rows (seq INTEGER PRIMARY KEY, body TEXT NOT NULL)")
    return connection


def write(connection: Connection, rows: list[tuple[str]]) -> None:
    """One batch, one transaction."""
    with connection.begin():
        connection.exec_driver_sql("INSERT INTO rows (body) VALUES (?)", rows)


async def actor(receive: MemoryObjectReceiveStream[Item], connection: Connection, thread: ThreadPoolExecutor) -> None:
    """Drain what waits, write it in one hop to the thread, answer after COMMIT."""
    loop = asyncio.get_running_loop()
    async for first in receive:
        batch = [first]
        while True:
            try:
                batch.append(receive.receive_nowait())
            except anyio.WouldBlock:
                break
        await loop.run_in_executor(thread, write, connection, [(body,) for body, _ in batch])
        for _, reply in batch:
            reply.set_result(None)


async def measure(path: Path, seconds: float) -> dict[str, float]:
    send: MemoryObjectSendStream[Item]
    send, receive = anyio.create_memory_object_stream[Item](1000)
    loop = asyncio.get_running_loop()

    async def commit(_: int) -> None:
        reply = loop.create_future()
        send.send_nowait((ROW, reply))
        await reply

    with ThreadPoolExecutor(1) as thread:
        connection = await loop.run_in_executor(thread, connect, path)
        writer = asyncio.create_task(actor(receive, connection, thread))
        await async_rate(commit, 100, seconds / 5)
        figures = {
            "commit_alone": await async_rate(commit, 1, seconds),
            "commit_100": await async_rate(commit, 100, seconds),
        }
        send.close()
        await writer
        await loop.run_in_executor(thread, connection.close)
    return figures


def main() -> None:
    options = arguments()
    report(asyncio.run(measure(options.dir / "bare.db", options.seconds)))


if __name__ == "__main__":
    main()
