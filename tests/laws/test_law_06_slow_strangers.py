"""Law 6, nothing waits for ever: slow handlers, publishers and rules hold up nobody else, or are named."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from spine import AuthorityDecision, OperationContext, Spine
from spine.governance.transactions import TransactionPhase
from spine.kernel.clock import VirtualClock
from spine.publisher import Event
from spine.settings import Settings
from tests.laws.waiting import Clocked
from tests.laws.world import ended, found, until

pytestmark = pytest.mark.anyio


async def test_slow_synchronous_handlers_do_not_delay_other_operations(sqlite_url: str) -> None:
    """More of them than a pool of worker threads has: another synchronous operation runs at once."""
    spine, release = Spine(sqlite_url), threading.Event()

    @spine.operation("slow.sync")
    def slow(ctx: OperationContext) -> None:
        release.wait(30)

    @spine.operation("fast.sync")
    def fast(ctx: OperationContext) -> None:
        pass

    async with spine:
        held = [asyncio.ensure_future(spine.execute("slow.sync", tenant_id="acme")) for _ in range(60)]
        try:
            await until(lambda: spine.health().decisions["allowed"] == 60)
            result = await spine.execute("fast.sync", tenant_id="acme", timeout_s=3)
        finally:
            release.set()
        assert result.success, result.error
        assert all(result.success for result in await ended(held))


async def test_a_publisher_that_hangs_delays_no_completion_and_no_other_run(sqlite_url: str) -> None:
    """The completion is answered without waiting for it long; events of other runs go out."""

    class Hangs:
        def __init__(self) -> None:
            self.out: list[str] = []
            self.release = asyncio.Event()

        async def publish(self, event: Event) -> None:
            if event.run_id == "run-stuck":
                await self.release.wait()
            self.out.append(event.run_id)

    publisher = Hangs()
    async with Spine(sqlite_url, publisher=publisher) as spine:
        with Clocked() as stuck:
            result = await spine.complete_run("run-stuck", tenant_id="acme", run_status="succeeded")
        assert result.phase is TransactionPhase.COMMITTED
        assert stuck.took < 4
        other = await spine.complete_run("run-2", tenant_id="acme", run_status="succeeded")
        assert other.phase is TransactionPhase.EVENTS_PUBLISHED
        publisher.release.set()
        await until(lambda: len(found(sqlite_url, "event.published")) == 2)
    assert publisher.out == ["run-2", "run-stuck"]


async def test_a_publisher_that_hangs_is_given_up_and_asked_again_on_the_injected_clock(sqlite_url: str) -> None:
    """Neither the completion's patience nor the publisher's time is the machine's own."""

    class HangsOnce:
        def __init__(self) -> None:
            self.asked: list[float] = []

        async def publish(self, event: Event) -> None:
            self.asked.append(clock.monotonic())
            if len(self.asked) == 1:
                await asyncio.Event().wait()

    clock, publisher = VirtualClock(time.time_ns() // 1000), HangsOnce()
    async with Spine(sqlite_url, publisher=publisher, settings=Settings(clock=clock)) as spine:
        call = asyncio.create_task(spine.complete_run("run-1", tenant_id="acme", run_status="succeeded"))
        await until(lambda: publisher.asked)
        await clock.advance(0.5)
        assert not call.done()
        await clock.advance(0.6)
        assert (await call).phase is TransactionPhase.COMMITTED
        await clock.advance(8)
        assert len(publisher.asked) == 1
        await clock.advance(2)
        assert len(publisher.asked) == 2
        assert 10 <= publisher.asked[1] - publisher.asked[0] < 11
        await until(lambda: len(found(sqlite_url, "event.published")) == 1)


async def test_what_holds_the_event_loop_is_named(sqlite_url: str) -> None:
    """A rule that blocks cannot be interrupted; it is told, with its name and its stack."""
    spine = Spine(sqlite_url, settings=Settings(blocked_s=0.1))
    holding = threading.Event()

    @spine.rule("work.*")
    def thinks_too_long(ctx: OperationContext) -> AuthorityDecision:
        holding.wait(0.8)
        return AuthorityDecision.allow()

    @spine.operation("work.fine")
    async def fine(ctx: OperationContext) -> None:
        pass

    async with spine:
        assert (await spine.execute("work.fine", tenant_id="acme")).success
        await until(lambda: spine.health().blocked)
        (blocked,) = spine.health().blocked
        assert blocked["culprit"] == "rule thinks_too_long"
        assert "thinks_too_long" in blocked["stack"]
