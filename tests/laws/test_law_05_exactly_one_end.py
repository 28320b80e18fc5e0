"""Law 5: every admitted envelope has exactly one end.

An ask ends replied, failed, expired or cancelled; a tell handled or dead-lettered. The counters prove
``admitted = ended + in flight`` at any instant.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spine import AuthorityDecision, OperationContext, OperationResult, Spine
from spine.governance.transactions import TransactionFailed, TransactionResult
from spine.kernel.errors import ActorCrashed, DeadlineExceeded, Overloaded, SpineFailed
from spine.kernel.ledger import LedgerCounts
from spine.kernel.messages import Lane
from spine.kernel.supervisor import Policy
from spine.settings import Settings
from tests.laws.world import back, ended, kill, poison, until
from tests.unit.kernel_rig import Kernel, Say, Worker, kernel, stop

pytestmark = pytest.mark.anyio

ASKED = ("replied", "failed", "expired", "cancelled")
TOLD = ("handled", "dead_lettered")


@asynccontextmanager
async def watched(counts: Callable[[], LedgerCounts]) -> AsyncIterator[list[LedgerCounts]]:
    """Look at the account at every turn of the event loop: it is never out of balance and never runs backwards."""
    seen = [counts()]

    async def look() -> None:
        while True:
            now, before = counts(), seen[-1]
            assert now.admitted == sum(now.ended.values()) + now.in_flight, now
            assert now.admitted >= before.admitted
            assert all(now.ended[end] >= before.ended[end] for end in now.ended), (before, now)
            if now != before:
                seen.append(now)
            await asyncio.sleep(0)

    watch = asyncio.ensure_future(look())
    try:
        yield seen
    finally:
        broken = watch.done()
        watch.cancel()
        result = (await asyncio.gather(watch, return_exceptions=True))[0]
        assert not broken, result


def busy(url: str, **options: Any) -> Spine:
    """A Spine with an operation for every ending."""
    spine = Spine(url, settings=Settings(drain_s=0.3, stop_s=3, **options))

    @spine.rule("work.denied")
    def never(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("no")

    @spine.operation("work.denied")
    @spine.operation("work.fine")
    @spine.operation("work.buffered", durability="buffered")
    async def fine(ctx: OperationContext) -> None:
        pass

    @spine.operation("work.fails")
    def fails(ctx: OperationContext) -> None:
        raise ValueError("as it must")

    @spine.operation("work.long", timeout_s=0.05)
    async def long(ctx: OperationContext) -> None:
        await anyio.sleep_forever()

    @spine.operation("work.narrow", concurrency=1)
    async def narrow(ctx: OperationContext) -> None:
        await asyncio.sleep(0)

    @spine.operation("work.outer")
    async def outer(ctx: OperationContext) -> OperationResult:
        await ctx.execute("work.narrow")
        return await ctx.execute("work.fine")

    @spine.operation("work.hangs")
    async def hangs(ctx: OperationContext) -> None:
        await anyio.sleep_forever()

    return spine


NAMES = ("fine", "denied", "buffered", "fails", "long", "narrow", "outer", "unknown")


def acceptable(result: object) -> bool:
    """What a caller may get: a result, its own cancellation, a crash, or a completion that could not be taken."""
    if isinstance(result, TransactionFailed):
        return result.code in ("OVERLOADED", "JOURNAL_UNAVAILABLE")
    return isinstance(result, (OperationResult, TransactionResult, asyncio.CancelledError, ActorCrashed))


async def test_the_account_is_even_at_every_turn_under_load_with_cancellations_and_expiries(sqlite_url: str) -> None:
    """Two hundred callers, few credits, every ending; a fifth of the callers go away at some turn of the loop."""
    spine, chance = busy(sqlite_url, credits=64), random.Random(5)

    async def caller(number: int) -> object:
        name = f"work.{NAMES[number % len(NAMES)]}"
        wait, timeout_s = number % 3 == 0, 0.002 if number % 11 == 0 else 20
        run = f"run-{number % 9}" if number % 2 else None
        if number % 23 == 0:
            return await spine.complete_run(f"run-{number}", tenant_id="acme", run_status="succeeded")
        return await spine.execute(name, tenant_id="acme", run_id=run, wait=wait, timeout_s=timeout_s)

    async with spine, watched(spine._system.exchange.ledger.counts) as seen:
        calls = []
        for number in range(200):
            calls.append(asyncio.ensure_future(caller(number)))
            if number % 5 == 0:
                asyncio.get_running_loop().call_later(chance.uniform(0, 0.1), calls[-1].cancel)
            if number % 8 == 0:
                await asyncio.sleep(0)
        results = await ended(calls)
        await spine.flush()
        await until(lambda: spine.health().messages.in_flight == 0)
        end = spine.health().messages
    assert not [result for result in results if not acceptable(result)]
    codes = Counter(result.error_code for result in results if isinstance(result, OperationResult))
    assert {None, "DENIED", "TIMEOUT", "OVERLOADED", "UNKNOWN_OPERATION", "HANDLER_EXCEPTION:ValueError"} <= set(codes)
    assert any(isinstance(result, asyncio.CancelledError) for result in results)
    assert len(seen) > 100
    assert end.ended["cancelled"] > 0
    assert end.ended["dead_lettered"] == 0


async def test_crashes_in_the_middle_of_the_load_leave_nothing_without_an_end(sqlite_url: str) -> None:
    """Registry, audit actor, coordinator and router are killed while callers wait: each call ends, and only once."""
    spine = busy(sqlite_url, supervision=Policy(intensity=50))

    async def caller(number: int) -> object:
        if number % 5 == 0:
            return await spine.complete_run(f"run-{number}", tenant_id="acme", run_status="succeeded")
        return await spine.execute(f"work.{NAMES[number % len(NAMES)]}", tenant_id="acme", run_id=f"run-{number % 7}")

    async with spine, watched(spine._system.exchange.ledger.counts):
        told: list[object] = []
        for round_, actor in enumerate(("registry", "audit", "coordinator", "router", "audit", "registry")):
            calls = [asyncio.ensure_future(caller(number)) for number in range(40)]
            for _ in range(round_ * 3):
                await asyncio.sleep(0)
            await kill(spine, actor)
            told += await ended(calls)
            await back(spine, actor, round_ + 1)
        await until(lambda: spine.health().messages.in_flight == 0)
        assert spine.health().restarts == 6
    assert len(told) == 240
    assert not [result for result in told if not acceptable(result)]


async def test_messages_that_no_actor_takes_end_too(sqlite_url: str) -> None:
    """Asks and tells that crash their actor, and such to an actor that does not exist."""
    spine = busy(sqlite_url, supervision=Policy(intensity=50))
    async with spine, watched(spine._system.exchange.ledger.counts):
        exchange = spine._system.exchange
        before = spine.health().messages
        for restart, actor in enumerate(("registry", "coordinator", "audit"), start=1):
            asked = poison(spine, actor)
            with pytest.raises(ActorCrashed):
                await exchange.answer(asked)
            await back(spine, actor, restart)
        for restart, actor in enumerate(("registry", "coordinator", "audit"), start=4):
            exchange.post(Say(), actor, timeout_s=10, reply=False)
            await back(spine, actor, restart)
        exchange.post(Say(), "nobody", timeout_s=10, reply=False)
        await until(lambda: spine.health().messages.in_flight == 0)
        after = spine.health().messages
        assert after.ended["failed"] - before.ended["failed"] == 3
        assert after.ended["dead_lettered"] - before.ended["dead_lettered"] == 4
        assert len(spine.health().dead_letters) == 4


async def test_a_stop_under_load_ends_everything_that_was_admitted(sqlite_url: str) -> None:
    """Handlers that hang, calls in the queue, callers waiting for a credit: after the stop nothing is in flight."""
    spine = busy(sqlite_url, credits=32)
    await spine.start()
    exchange = spine._system.exchange
    async with watched(exchange.ledger.counts):
        calls = [asyncio.ensure_future(spine.execute("work.hangs", tenant_id="acme")) for _ in range(16)]
        calls += [asyncio.ensure_future(spine.execute("work.narrow", tenant_id="acme")) for _ in range(16)]
        calls += [asyncio.ensure_future(spine.execute("work.fine", tenant_id="acme", wait=True)) for _ in range(16)]
        await until(lambda: any(call.done() for call in calls))
        await spine.stop()
        results = await ended(calls)
        counts = exchange.ledger.counts()
    assert counts.in_flight == 0
    assert counts.admitted == sum(counts.ended.values())
    assert len(results) == 48
    codes = Counter(getattr(result, "error_code", type(result).__name__) for result in results)
    assert codes["INTERRUPTED"] >= 16
    assert set(codes) <= {None, "INTERRUPTED", "NotRunning"}


async def test_when_supervision_gives_up_everything_in_flight_ends(sqlite_url: str) -> None:
    """Beyond the intensity no message is left waiting, and the account stays even."""
    spine = busy(sqlite_url, supervision=Policy(intensity=0))
    await spine.start()
    exchange = spine._system.exchange
    async with watched(exchange.ledger.counts):
        calls = [asyncio.ensure_future(spine.execute("work.hangs", tenant_id="acme")) for _ in range(20)]
        await until(lambda: spine.health().decisions["allowed"] == 20)
        poison(spine, "coordinator")
        results = await ended(calls)
        assert {type(result) for result in results} == {SpineFailed}
        await spine.stop()
        assert exchange.ledger.counts().in_flight == 0


# -- any mix, on the kernel alone


class Later(Worker):
    """Also answers after a while, in time or too late, and from a task of its own."""

    def receive(self, envelope: Any) -> None:
        if envelope.payload.how == "later":
            asyncio.get_running_loop().call_later(0.004, envelope.reply, "later")
        else:
            super().receive(envelope)


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "reply",
                "reply",
                "fail",
                "silence",
                "twice",
                "later",
                "late",
                "crash",
                "tell",
                "told crash",
                "nobody",
                "cancel",
                "ingress",
                "kill",
                "yield",
            ]
        ),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=40,
)


@given(STEPS, st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mix_of_messages_ends_each_exactly_once(steps: list[Step], stopped_early: bool) -> None:
    """Replies, failures, silence, double and late replies, crashes, cancellations, full credits, kills, an early stop.

    What the ledger says of the ends is what the callers saw, one for one.
    """
    anyio.run(mix, steps, stopped_early)


async def mix(steps: list[Step], stopped_early: bool) -> None:
    policy = Policy(intensity=1000, backoff_first_s=0.0005, backoff_most_s=0.001)
    asks: list[asyncio.Future[Any]] = []
    tells = refused = 0
    async with kernel(Later, credits=12, policy=policy) as built, watched(built.exchange.ledger.counts):
        exchange = built.exchange
        for how, turns in steps:
            match how:
                case "tell" | "told crash":
                    tells += 1
                    exchange.post(Say("crash" if how == "told crash" else "tell"), "worker", timeout_s=5, reply=False)
                case "ingress":
                    try:
                        sent = exchange.post(Say("later"), "worker", timeout_s=5, lane=Lane.INGRESS)
                    except Overloaded:
                        refused += 1
                    else:
                        asks.append(asyncio.ensure_future(exchange.answer(sent)))
                case "cancel" if asks:
                    asks[turns % len(asks)].cancel()
                case "kill" if built.supervisor.states()["worker"] == "ready":
                    built.supervisor._children["worker"].task.cancel()  # type: ignore[union-attr]
                case "yield":
                    await asyncio.sleep(0)
                case "cancel" | "kill":
                    pass
                case _:
                    to = "nobody" if how == "nobody" else "worker"
                    kind = {"late": "later", "nobody": "reply"}.get(how, how)
                    sent = exchange.post(Say(kind), to, timeout_s=0.001 if how in ("late", "silence") else 5)
                    asks.append(asyncio.ensure_future(exchange.answer(sent)))
            for _ in range(turns):
                await asyncio.sleep(0)
        if stopped_early:
            await stop(built)
        results = await asyncio.gather(*asks, return_exceptions=True)
        await until(lambda: exchange.ledger.counts().in_flight == 0)
        assert_told(built, results, tells, refused)


def assert_told(built: Kernel, results: list[object], tells: int, refused: int) -> None:
    counts = built.exchange.ledger.counts()
    saw = Counter(
        "replied"
        if isinstance(result, str)
        else "cancelled"
        if isinstance(result, asyncio.CancelledError)
        else "expired"
        if isinstance(result, DeadlineExceeded)
        else "failed"
        for result in results
    )
    # An ask whose caller was cancelled in the very step of its reply ended as what came first.
    assert sum(saw.values()) == sum(counts.ended[end] for end in ASKED) == len(results)
    assert saw["cancelled"] >= counts.ended["cancelled"]
    assert {end: saw[end] for end in ("expired", "failed", "replied")} == {
        end: counts.ended[end] for end in ("expired", "failed", "replied")
    } or saw["cancelled"] > counts.ended["cancelled"]
    signals = len(built.supervisor.receipts)
    assert tells <= sum(counts.ended[end] for end in TOLD) <= tells + signals
    assert counts.refused >= refused
    assert built.exchange.credits_in_use == 0
