"""Law 2: another closes the open decisions of the dead alone; the late end of one taken for dead is recorded too."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from typing import Any

import pytest

from spine import OperationContext, Spine
from spine.settings import Settings
from tests.governed import clock
from tests.laws.world import assert_intact, file_of, found, rows, unanswered, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("ahead_s", [0, 60])
async def test_the_decisions_of_a_process_that_lives_are_left_alone(sqlite_url: str, ahead_s: int) -> None:
    """A second process on the same database does not close what the first one still works at.

    Not even when the first one's lease has run out, as of a process that was held up: it is known to live.
    """
    release = asyncio.Event()
    first, second = Spine(sqlite_url), Spine(sqlite_url, settings=Settings(clock=clock(ahead_s)))

    @first.operation("work.long")
    async def long(ctx: OperationContext) -> None:
        await release.wait()

    async with first:
        running = asyncio.ensure_future(first.execute("work.long", tenant_id="acme"))
        await until(lambda: unanswered(rows(sqlite_url)))
        async with second:
            # Its housekeeping sweeps at the start, before it says anything of its own through this question.
            await second.start_run("run-1", tenant_id="acme")
            await second._system.dependencies.recovery.sweep()
            assert unanswered(rows(sqlite_url))
        release.set()
        assert (await running).success
    (outcome,) = found(sqlite_url, "outcome")
    assert outcome["success"]


async def test_a_blocked_loop_does_not_lose_the_lease(sqlite_url: str) -> None:
    """The lease moves on while nothing else of the process does."""
    spine = Spine(sqlite_url)

    def lease() -> int:
        with closing(sqlite3.connect(file_of(sqlite_url))) as db:
            return sum(until for (until,) in db.execute("SELECT lease_until_at FROM instances"))

    @spine.operation("work.block")
    async def block(ctx: OperationContext) -> dict[str, bool]:
        before, give_up = lease(), time.monotonic() + 15
        while lease() == before and time.monotonic() < give_up:
            time.sleep(0.05)  # noqa: ASYNC251  it is to block
        return {"renewed": lease() > before}

    async with spine:
        assert (await spine.execute("work.block", tenant_id="acme")).data == {"renewed": True}
    assert lease() == 0


@pytest.mark.parametrize("durability", ["committed", "buffered"])
async def test_an_operation_that_ends_after_it_was_taken_for_dead_is_recorded_as_it_ended(
    sqlite_url: str, durability: Any
) -> None:
    """Of another machine only the lease tells. Its late end is not lost: the journal and ``why`` have it."""
    release = asyncio.Event()
    first, second = Spine(sqlite_url), Spine(sqlite_url, settings=Settings(clock=clock(ahead_s=60)))

    @first.operation("work.long", durability=durability)
    async def long(ctx: OperationContext) -> None:
        await release.wait()

    async with first:
        running = asyncio.ensure_future(first.execute("work.long", tenant_id="acme", run_id="run-1"))
        await until(lambda: unanswered(rows(sqlite_url)))
        with closing(sqlite3.connect(file_of(sqlite_url), isolation_level=None)) as db:
            db.execute("UPDATE instances SET process = 'elsewhere/1/1'")
        async with second:
            await until(lambda: found(sqlite_url, "outcome", error_code="INTERRUPTED"))
            assert "INTERRUPTED" in str(await second.why("run-1"))
        release.set()
        result = await running
        if durability == "committed":
            assert (result.error_code, result.durable) == ("OUTCOME_UNRECORDED", False)
            assert "ran and succeeded" in str(result.error)
            assert "closed its decision as INTERRUPTED" in str(result.error)
        await until(lambda: found(sqlite_url, "outcome.late"))
        told = await first.why("run-1")
        await until(lambda: first.health().journal["unrecorded"] == 0)
    (late,), (decision,) = found(sqlite_url, "outcome.late"), found(sqlite_url, "decision")
    assert (late["decision_id"], late["success"]) == (decision["decision_id"], True)
    assert len(found(sqlite_url, "outcome")) == 1
    (line,) = told.to_dict()["decisions"]
    assert (line["outcome"]["success"], line["outcome"]["error_code"]) == (True, None)
    assert "succeeded late, after another process had recorded it as INTERRUPTED" in str(told)
    assert_intact(sqlite_url)
