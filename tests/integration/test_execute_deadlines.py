"""A handler that hangs, is late or blocks the loop is answered for at its deadline, or told of."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import anyio
import pytest

from spine import AuthorityDecision, OperationContext, OperationResult
from tests.governed import intact, journal, running, until
from tests.integration.desk import Desk, sound
from tests.stubborn import swallow_cancellation

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("declared", "asked"), [(1, 30), (30, 1)])
async def test_a_handler_that_hangs_is_cancelled_at_the_earlier_deadline(
    desk: Desk, declared: float, asked: float
) -> None:
    """TIMEOUT, of the operation or of the call, whichever is first; the outcome says it may have taken effect."""
    cancelled = asyncio.Event()

    @desk.spine.operation("desk.hang", timeout_s=declared)
    async def hang(ctx: OperationContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with running(desk.spine):
        with anyio.fail_after(5):
            result = sound(await desk.execute("desk.hang", timeout_s=asked))
        assert result.error_code == "TIMEOUT"
        assert "1 s" in str(result.error)
        assert cancelled.is_set()
    (outcome,) = journal(desk.url, "outcome")
    assert outcome["error_code"] == "TIMEOUT"
    assert outcome["handle_us"] >= 90_000


async def test_what_is_late_before_it_starts_does_not_start(desk: Desk) -> None:
    """A call whose deadline passed while it waited is a recorded TIMEOUT and its handler never runs."""
    async with running(desk.spine), anyio.create_task_group() as group:
        group.start_soon(partial(desk.execute, "desk.single"))
        await until(lambda: desk.entered == 1)
        result = sound(await desk.execute("desk.single", timeout_s=0.1))
        assert result.error_code == "TIMEOUT"
        tiny = sound(await desk.execute(timeout_s=1e-9))
        assert tiny.error_code == "TIMEOUT"
        desk.leave.set()
    assert desk.entered == 1
    late = [body for body in journal(desk.url, "decision") if body["code"] == "TIMEOUT"]
    assert len(late) == 2
    assert all(body["final"] for body in late)


async def test_a_handler_that_swallows_its_cancellation_keeps_its_slot_and_not_its_caller(desk: Desk) -> None:
    """The caller is answered, the outcome recorded once; the slot is free when the handler really ends."""
    leave = asyncio.Event()

    @desk.spine.operation("desk.stubborn", timeout_s=1, concurrency=1)
    async def stubborn(ctx: OperationContext) -> dict[str, Any]:
        await swallow_cancellation(leave)
        return {}

    async with running(desk.spine):
        with anyio.fail_after(5):
            result = sound(await desk.execute("desk.stubborn", run_id="run-1"))
        assert result.error_code == "TIMEOUT"
        assert "swallowed" in str(result.error)
        assert desk.spine.health().decisions["stuck"] == 1
        assert sound(await desk.execute("desk.stubborn")).error_code == "TIMEOUT"
        assert sound(await desk.execute()).success
        leave.set()
        await until(lambda: desk.spine._system.exchange.credits_in_use == 0)
        assert (await desk.execute("desk.stubborn")).success
    outcomes = [body for body in journal(desk.url, "outcome") if body["run_id"] == "run-1"]
    assert [body["error_code"] for body in outcomes] == ["TIMEOUT"]
    intact(desk.url)


async def test_a_nested_call_has_only_the_time_that_is_left(desk: Desk) -> None:
    """Deadlines are inherited: a slow nested call ends with its caller's budget, not its own."""

    @desk.spine.operation("desk.outer", timeout_s=1)
    async def outer(ctx: OperationContext) -> OperationResult:
        return await ctx.execute("desk.slow")

    async with running(desk.spine):
        with anyio.fail_after(5):
            result = sound(await desk.execute("desk.outer", run_id="run-1"))
        assert result.error_code == "TIMEOUT"
        await until(lambda: len(journal(desk.url, "outcome")) == 2)
    assert {body["error_code"] for body in journal(desk.url, "outcome")} == {"TIMEOUT"}


@pytest.mark.parametrize("who", ["operation desk.block", "rule sleepy"])
async def test_what_blocks_the_loop_is_named_with_its_stack(sqlite_url: str, who: str) -> None:
    """``health().blocked`` tells which operation or rule held the loop, for how long, and where it stood."""
    desk = Desk(sqlite_url, blocked_s=0.1)

    def hold() -> None:
        time.sleep(0.7)

    @desk.spine.operation("desk.block")
    async def block(ctx: OperationContext) -> dict[str, Any]:
        if who.startswith("operation"):
            hold()
        return {}

    @desk.spine.rule("desk.block", id="sleepy")
    def sleepy(ctx: OperationContext) -> AuthorityDecision:
        if who.startswith("rule"):
            hold()
        return AuthorityDecision.allow()

    async with running(desk.spine):
        assert desk.spine.health().blocked == ()
        assert (await desk.execute("desk.block")).success
        await until(lambda: desk.spine.health().blocked)
        report = desk.spine.health().blocked[0]
    assert report["culprit"] == who
    assert "in hold" in report["stack"]
    assert 0.1 <= report["seconds"] < 5
