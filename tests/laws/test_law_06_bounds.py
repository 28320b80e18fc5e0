"""Law 6, nothing waits for ever: every queue has a bound, and so have calls inside calls."""

from __future__ import annotations

import asyncio
from collections import Counter

import anyio
import pytest

from spine import OperationContext, OperationResult, Spine
from spine.settings import Settings
from tests.laws.waiting import Clocked
from tests.laws.world import ended, rows, unanswered, until

pytestmark = pytest.mark.anyio


async def test_a_full_spine_mailbox_answers_at_once(sqlite_url: str) -> None:
    """All credits in use: OVERLOADED now, not after the deadline; control messages still pass."""
    spine, release = Spine(sqlite_url, settings=Settings(credits=4)), asyncio.Event()

    @spine.operation("work.hold")
    async def hold(ctx: OperationContext) -> None:
        await release.wait()

    async with spine:
        held = [asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme")) for _ in range(4)]
        await until(lambda: spine.health().decisions["allowed"] == 4)
        with Clocked() as call:
            refused = await spine.execute("work.hold", tenant_id="acme")
        assert refused.error_code == "OVERLOADED"
        assert call.took < 1
        assert (await spine.start_run("run-1", tenant_id="acme")).code == "OVERLOADED"
        await spine.degrade(reason="a test", actor="law 6")
        release.set()
        assert all(result.success for result in await ended(held))


async def test_a_caller_may_wait_for_a_full_mailbox_and_never_longer_than_its_own_deadline(sqlite_url: str) -> None:
    """``wait=True``: one gets in when a credit comes free, one gives up when its time is over."""
    spine, release = Spine(sqlite_url, settings=Settings(credits=1)), asyncio.Event()

    @spine.operation("work.hold")
    async def hold(ctx: OperationContext) -> None:
        await release.wait()

    @spine.operation("work.fine")
    async def fine(ctx: OperationContext) -> None:
        pass

    async with spine:
        held = asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme"))
        await until(lambda: spine.health().decisions["allowed"] == 1)
        with Clocked() as call:
            late = await spine.execute("work.fine", tenant_id="acme", wait=True, timeout_s=0.1)
        assert late.error_code == "OVERLOADED"
        assert 0.09 <= call.took < 2
        patient = asyncio.ensure_future(spine.execute("work.fine", tenant_id="acme", wait=True, timeout_s=20))
        await anyio.wait_all_tasks_blocked()
        assert not patient.done()
        release.set()
        assert (await patient).success
        assert (await held).success


async def test_every_mailbox_is_bounded(sqlite_url: str) -> None:
    """However many messages come while nobody takes them, a mailbox holds a fixed number and refuses the rest."""
    spine = Spine(sqlite_url, settings=Settings(credits=8))
    async with spine:
        for mailbox in spine._system.exchange.mailboxes.values():
            for stream in mailbox._streams:
                assert 1 <= stream.statistics().max_buffer_size < 10_000


async def test_two_limited_operations_that_call_each_other_do_not_deadlock(sqlite_url: str) -> None:
    """One slot each, many callers, each nests the other and that one the first again: a nested call never waits."""
    spine = Spine(sqlite_url)

    def mutual(name: str, other: str) -> None:
        @spine.operation(name, concurrency=1)
        async def handler(ctx: OperationContext) -> OperationResult:
            if ctx.params["depth"] == 0:
                return OperationResult.ok()
            await asyncio.sleep(0)
            return await ctx.execute(other, {"depth": ctx.params["depth"] - 1})

    mutual("left.go", "right.go")
    mutual("right.go", "left.go")
    async with spine:
        with Clocked() as all_:
            calls = [
                spine.execute(("left.go", "right.go")[number % 2], tenant_id="acme", params={"depth": 3})
                for number in range(20)
            ]
            codes = Counter(result.error_code for result in await ended(calls))
        assert all_.took < 10
        assert set(codes) <= {None, "OVERLOADED"}
        assert codes["OVERLOADED"] > 0
        assert not unanswered(rows(sqlite_url))


async def test_an_operation_that_nests_itself_without_end_is_stopped_by_a_bound(sqlite_url: str) -> None:
    """By its own concurrency, or by the credits: never by the memory or the clock."""
    spine = Spine(sqlite_url, settings=Settings(credits=100))
    depth = Counter[str]()

    @spine.operation("deep.narrow")
    async def narrow(ctx: OperationContext) -> OperationResult:
        depth["narrow"] += 1
        return await ctx.execute("deep.narrow")

    @spine.operation("deep.wide", concurrency=1_000_000)
    async def wide(ctx: OperationContext) -> OperationResult:
        depth["wide"] += 1
        return await ctx.execute("deep.wide")

    async with spine:
        for name in ("deep.narrow", "deep.wide"):
            result = await spine.execute(name, tenant_id="acme")
            assert result.error_code == "OVERLOADED"
        assert spine.health().messages.in_flight == 0
    assert depth == {"narrow": 64, "wide": 100}
