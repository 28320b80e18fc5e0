"""What tests of a running Spine share: its account checked at the end, and its journal read without its own reader."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio

from spine import Event, Spine
from spine.journal.verify import verify
from spine.kernel.clock import VirtualClock

SQLITE = "sqlite+aiosqlite:///"


@asynccontextmanager
async def running(*spines: Spine) -> AsyncIterator[None]:
    """Run the Spines; afterwards every message any of them admitted has had exactly one end."""
    if not spines:
        yield
        return
    async with spines[0]:
        ledger = spines[0]._system.exchange.ledger
        async with running(*spines[1:]):
            yield
    counts = ledger.counts()
    assert counts.balanced, counts
    assert counts.in_flight == 0, counts


def path_of(url: str) -> Path:
    assert url.startswith(SQLITE)
    return Path(url.removeprefix(SQLITE))


def connect(url: str) -> Any:
    """A connection of the test's own, in autocommit."""
    if url.startswith(SQLITE):
        return sqlite3.connect(path_of(url), isolation_level=None, timeout=10, check_same_thread=False)
    import psycopg

    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def query(url: str, sql: str, *params: Any) -> list[tuple[Any, ...]]:
    """What a statement (written with ``?``) gives."""
    with closing(connect(url)) as connection:
        cursor = connection.execute(sql if url.startswith(SQLITE) else sql.replace("?", "%s"), params)
        return list(cursor.fetchall()) if cursor.description is not None else []


def journal(url: str, *kinds: str) -> list[dict[str, Any]]:
    """The bodies of the journal in their order, each with its ``seq``; all kinds unless some are named."""
    found = [json.loads(body) | {"seq": seq} for seq, body in query(url, "SELECT seq, body FROM journal ORDER BY seq")]
    return [body for body in found if not kinds or body["kind"] in kinds]


def kinds(url: str) -> list[str]:
    return [body["kind"] for body in journal(url)]


def intact(url: str) -> None:
    """The chain, its head, its columns and its projections fit."""
    report = verify(url)
    assert report.ok, report.breaks


async def until(true: Callable[[], Any], *, within_s: float = 15.0, clock: VirtualClock | None = None) -> None:
    """Return once the condition holds, fail when it does not in time; a virtual clock goes on by seconds meanwhile."""
    give_up = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up, "the condition never held"
        await (anyio.sleep(0.005) if clock is None else clock.advance(1))


def clock(ahead_s: float = 0) -> VirtualClock:
    """A clock of the test's own, which stands at this moment, or so far from it."""
    return VirtualClock(time.time_ns() // 1000 + round(ahead_s * 1e6))


@asynccontextmanager
async def flowing(clock: VirtualClock, *, times: float = 1) -> AsyncIterator[None]:
    """Let virtual time go on about as fast as real time, or so many times as fast."""

    async def flow() -> None:
        while True:
            await clock.advance(0.01)
            await asyncio.sleep(0.01 / times)

    task = asyncio.create_task(flow())
    try:
        yield
    finally:
        task.cancel()


async def together(*work: Callable[[], Awaitable[Any]]) -> list[Any]:
    """The results of callables awaited at the same time, in their order."""
    results: list[Any] = [None] * len(work)

    async def one(at: int) -> None:
        results[at] = await work[at]()

    async with anyio.create_task_group() as group:
        for at in range(len(work)):
            group.start_soon(one, at)
    return results


class Published:
    """A publisher that keeps what it is given; it fails, as long as told to, before it keeps anything."""

    def __init__(self, *, failures: int = 0) -> None:
        self.failures = failures
        self.tries = 0
        self.events: list[Event] = []

    async def publish(self, event: Event) -> None:
        self.tries += 1
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("the broker is away")
        self.events.append(event)


def authority_fields(metadata: Any) -> Sequence[str]:
    """Which of the four fields that every result carries are absent."""
    wanted = ("governance_active", "authority_degraded", "authority_reason", "authority_code")
    return [name for name in wanted if name not in metadata]
