"""Law 6, nothing waits for ever: every call is answered at its deadline, whatever holds it up."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import anyio
import pytest
from structlog.testing import capture_logs

from spine import OperationContext, OperationResult, Spine
from tests.laws.waiting import Clocked, locked
from tests.laws.world import assert_intact, found, rows, unanswered, until
from tests.stubborn import swallow_cancellation

pytestmark = pytest.mark.anyio


async def test_a_nested_call_inherits_the_time_that_is_left(sqlite_url: str) -> None:
    """Three operations deep, each allowed thirty seconds by itself: all of it ends with the outermost deadline."""
    spine = Spine(sqlite_url)
    deadlines: dict[str, float] = {}

    @spine.operation("deep.one")
    async def one(ctx: OperationContext) -> OperationResult:
        deadlines["one"] = ctx.deadline
        return await ctx.execute("deep.two")

    @spine.operation("deep.two")
    async def two(ctx: OperationContext) -> OperationResult:
        deadlines["two"] = ctx.deadline
        return await ctx.execute("deep.three")

    @spine.operation("deep.three")
    async def three(ctx: OperationContext) -> None:
        deadlines["three"] = ctx.deadline
        await anyio.sleep_forever()

    async with spine:
        with Clocked() as call:
            result = await spine.execute("deep.one", tenant_id="acme", run_id="run-1", timeout_s=1)
        assert result.error_code == "TIMEOUT"
        assert call.took < 3
        assert deadlines["three"] - 0.001 <= deadlines["two"] <= deadlines["one"] + 0.001
        await until(lambda: not unanswered(rows(sqlite_url)))
    outcomes = {row["operation"]: row["error_code"] for row in found(sqlite_url, "outcome")}
    assert set(outcomes) == {"deep.one", "deep.two", "deep.three"}
    assert set(outcomes.values()) <= {"TIMEOUT", "CANCELLED", "INTERRUPTED"}


async def test_a_call_whose_deadline_passes_in_the_queue_for_a_slot_never_runs(sqlite_url: str) -> None:
    """It is answered at its deadline, though the slot comes free much later."""
    spine, release = Spine(sqlite_url), asyncio.Event()
    ran: list[int] = []

    @spine.operation("work.narrow", concurrency=1)
    async def narrow(ctx: OperationContext) -> None:
        ran.append(ctx.params["n"])
        await release.wait()

    async with spine:
        first = asyncio.ensure_future(spine.execute("work.narrow", tenant_id="acme", params={"n": 1}))
        await until(lambda: ran == [1])
        with Clocked() as call:
            late = await spine.execute("work.narrow", tenant_id="acme", params={"n": 2}, timeout_s=0.1)
        assert late.error_code == "TIMEOUT"
        assert call.took < 2
        release.set()
        assert (await first).success
        assert (await spine.execute("work.narrow", tenant_id="acme", params={"n": 3})).success
    assert ran == [1, 3]


async def test_a_handler_that_swallows_its_cancellation_delays_nobody_but_itself(sqlite_url: str) -> None:
    """Its caller is answered soon after the deadline; it keeps its slot until it ends; everybody else goes on."""
    spine, release = Spine(sqlite_url), asyncio.Event()

    @spine.operation("work.stubborn", timeout_s=1, concurrency=1)
    async def stubborn(ctx: OperationContext) -> None:
        await swallow_cancellation(release)

    @spine.operation("work.fine")
    async def fine(ctx: OperationContext) -> None:
        pass

    async with spine:
        with Clocked() as call:
            result = await spine.execute("work.stubborn", tenant_id="acme", run_id="run-1")
        assert result.error_code == "TIMEOUT"
        assert "swallowed its cancellation" in str(result.error)
        assert call.took < 4
        assert found(sqlite_url, "outcome", error_code="TIMEOUT")
        assert (await spine.execute("work.fine", tenant_id="acme")).success
        second = await spine.execute("work.stubborn", tenant_id="acme")
        assert second.error_code == "TIMEOUT"
        assert (await spine.status())["operations"]["work.stubborn"]["running"] == 1
        release.set()
        await until(lambda: not spine._system.supervisor._children["registry"].actor._calls)  # type: ignore[union-attr]
        assert (await spine.status())["operations"]["work.stubborn"]["running"] == 0


async def test_a_synchronous_handler_that_hangs_keeps_its_slot_and_its_thread_until_it_ends(sqlite_url: str) -> None:
    """One slot, ten calls, one thread: the first is answered at its deadline and told of as stuck, the others wait."""
    spine, release, entered = Spine(sqlite_url), threading.Event(), Counter[int]()

    @spine.operation("work.hang", timeout_s=1, concurrency=1)
    def hang(ctx: OperationContext) -> None:
        entered[ctx.params["n"]] += 1
        release.wait(30)

    async with spine:
        with capture_logs() as logs, Clocked() as calls:
            results = [await spine.execute("work.hang", tenant_id="acme", run_id="run-1", params={"n": 0})]
            results += [
                await spine.execute("work.hang", tenant_id="acme", run_id="run-1", params={"n": n}, timeout_s=0.1)
                for n in range(1, 10)
            ]
        assert {result.error_code for result in results} == {"TIMEOUT"}
        assert "its thread cannot be cancelled" in str(results[0].error)
        assert calls.took < 9
        assert entered == {0: 1}
        assert [log["operation"] for log in logs if log["event"] == "spine.operation.stuck"] == ["work.hang"]
        assert spine.health().decisions["stuck"] == 1
        assert (await spine.status())["operations"]["work.hang"]["running"] == 1
        with capture_logs() as logs:
            release.set()
            await until(lambda: [log for log in logs if log["event"] == "spine.operation.late"])
        assert (await spine.execute("work.hang", tenant_id="acme", params={"n": 10})).success
        assert (await spine.status())["operations"]["work.hang"]["running"] == 0
    assert not unanswered(rows(sqlite_url))
    assert [row["error_code"] for row in found(sqlite_url, "outcome")] == ["TIMEOUT", None]


async def test_a_call_that_a_locked_database_held_past_its_deadline_does_not_run(sqlite_url: str) -> None:
    """Its decision could be committed only later: the caller hears TIMEOUT, and the next call works."""
    spine = Spine(sqlite_url)
    ran: list[int] = []

    @spine.operation("work.step")
    async def step(ctx: OperationContext) -> None:
        ran.append(ctx.params["n"])

    async with spine:
        with locked(sqlite_url, 0.6), Clocked() as call:
            result = await spine.execute("work.step", tenant_id="acme", params={"n": 1}, timeout_s=0.2)
        assert result.error_code == "TIMEOUT"
        assert call.took < 5
        assert (await spine.execute("work.step", tenant_id="acme", params={"n": 2})).success
    assert ran == [2]
    assert not unanswered(rows(sqlite_url))
    assert_intact(sqlite_url)
