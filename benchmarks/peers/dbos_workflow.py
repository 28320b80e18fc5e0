"""DBOS: a durable workflow of one or more steps on SQLite, as installed or at its best (WAL, synchronous=FULL)."""

from __future__ import annotations

import sqlite3
import warnings
from typing import Any

from dbos import DBOS
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from benchmarks.harness import PAYLOAD
from benchmarks.side import arguments, report, thread_rate

CALLERS = (1, 10, 30, 100)


@DBOS.step()
def step(params: dict[str, Any]) -> dict[str, Any]:
    """Every step of the workflow."""
    return params


@DBOS.workflow()
def workflow(params: dict[str, Any], steps: int) -> dict[str, Any]:
    """Synchronous, called from threads: measured faster than the asynchronous kind."""
    for _ in range(steps):
        params = step(params)
    return params


def wal_and_full() -> None:
    """Switch every SQLite connection that DBOS opens from here on."""

    @event.listens_for(Engine, "connect")
    def settings(dbapi: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        cursor = dbapi.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()


def main() -> None:
    options = arguments("--mode", "--pool", "--steps")
    warnings.simplefilter("ignore")
    if options.mode == "best":
        wal_and_full()
    path = options.dir / "dbos.sqlite"
    config: dict[str, Any] = {"name": "bench", "system_database_url": f"sqlite:///{path}", "log_level": "ERROR"}
    if options.pool:
        config["sys_db_pool_size"] = int(options.pool)
    DBOS(config=config)
    DBOS.launch()
    params, steps = {"payload": PAYLOAD}, int(options.steps or 1)
    try:
        thread_rate(lambda: workflow(params, steps), 1, options.seconds / 5)
        figures = {f"workflow_{n}": thread_rate(lambda: workflow(params, steps), n, options.seconds) for n in CALLERS}
    finally:
        DBOS.destroy()
    with sqlite3.connect(path) as connection:
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    expected = "wal" if options.mode == "best" else "delete"
    if mode != expected:
        raise SystemExit(f"DBOS ran with journal_mode={mode} where {expected} was wanted; the figures would mislead")
    report(figures)


if __name__ == "__main__":
    main()
