"""What the laws look at: the journal as SQLite holds it, read without Spine, and a Spine's actors from the outside."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio

from spine import Spine
from spine.journal.verify import verify
from spine.kernel.messages import Envelope

# The clock of a simulated day.
START_US = 1_750_000_000_000_000


def file_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite+aiosqlite:///"))


def rows(url: str) -> list[dict[str, Any]]:
    """Every journal row's body in order, with its ``seq``; read by SQLite alone."""
    with closing(sqlite3.connect(f"file:{file_of(url)}?mode=ro", uri=True)) as db:
        found = db.execute("SELECT seq, body FROM journal ORDER BY seq").fetchall()
    return [json.loads(body) | {"seq": seq} for seq, body in found]


def size(url: str) -> int:
    """How many rows the journal has."""
    with closing(sqlite3.connect(f"file:{file_of(url)}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM journal").fetchone()[0])


def found(url: str, kind: str, **fields: Any) -> list[dict[str, Any]]:
    """The rows of one kind whose fields are these."""
    return [
        row
        for row in rows(url)
        if row["kind"] == kind and all(row.get(name) == value for name, value in fields.items())
    ]


def assert_intact(url: str, **options: Any) -> None:
    report = verify(url, **options)
    assert report.ok, report.breaks


def unanswered(journal: Sequence[dict[str, Any]]) -> set[str]:
    """The decisions that let a handler run and of whose end nothing is recorded."""
    begun = {row["decision_id"] for row in journal if row["kind"] == "decision" and not row["final"]}
    return begun - {row["decision_id"] for row in journal if row["kind"] == "outcome"}


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not within ``seconds``."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.002)


async def ended(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """How every call ended: its result or its exception."""
    return await asyncio.gather(*calls, return_exceptions=True)


def incarnation(name: str) -> asyncio.Task[Any]:
    """The task in which an actor lives now."""
    (task,) = [task for task in asyncio.all_tasks() if task.get_name().startswith(f"spine.{name}.")]
    return task


async def kill(spine: Spine, name: str) -> None:
    """End an actor from outside, in whatever it does; return once the supervisor knows."""
    restarts = spine.health().restarts
    incarnation(name).cancel()
    await until(lambda: spine.health().restarts > restarts or spine.health().status == "failed")


class Poison:
    """A message that no actor understands: the loop that takes it crashes."""

    __slots__ = ()


def poison(spine: Spine, name: str) -> Envelope:
    """Send an actor what it cannot take, through the spine mailbox like everything."""
    return spine._system.exchange.post(Poison(), name, timeout_s=20, sender="poisoner")


def recording(spine: Spine, *, taken: bool) -> list[str]:
    """The kinds of the records that the audit actor has taken, or that still lie in its mailbox."""
    return [
        record.kind
        for envelope in spine._system.exchange.ledger.open.values()
        if envelope.recipient == "audit" and envelope.seq and (envelope.holder == "audit") is taken
        for record in (envelope.payload.unit.records if hasattr(envelope.payload, "unit") else ())
    ]


async def back(spine: Spine, name: str, restarts: int = 1) -> None:
    """Return once the actor runs again."""
    await until(lambda: spine.health().restarts >= restarts and spine.health().actors[name] == "ready")


async def at_rest(spine: Spine) -> None:
    """Return when nothing moves that could move by itself: the loop's tasks wait, the journal's writer has nothing."""
    before = -1
    while before != (before := spine._system.exchange.last_seq):
        for _ in range(20):
            await asyncio.sleep(0)
        await spine._system.writer.find_units([], 0)
