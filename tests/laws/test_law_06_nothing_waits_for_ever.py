"""Law 6: nothing waits for ever.

Every wait has a deadline; every queue a bound; stop returns within its deadline with a receipt for each child.
"""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Self

import anyio
import pytest
from structlog.testing import capture_logs

from spine import AuthorityDecision, OperationContext, OperationResult, Spine
from spine.governance.transactions import TransactionPhase
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import NotRunning
from spine.kernel.exchange import ROUTER
from spine.publisher import Event
from spine.settings import Settings
from tests.laws.world import assert_intact, ended, file_of, found, incarnation, rows, unanswered, until

pytestmark = pytest.mark.anyio

CHILDREN = ["coordinator", "registry", ROUTER, "audit"]


class Clocked:
    """How many seconds something took."""

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.took = time.monotonic() - self.began


def ours() -> list[str]:
    """The tasks of a Spine that still live."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("spine.") or name in ("outbox", "StartRun", "CompleteRun")]


# -- the spine mailbox


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


# -- deadlines


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
            result = await spine.execute("deep.one", tenant_id="acme", run_id="run-1", timeout_s=0.3)
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

    @spine.operation("work.stubborn", timeout_s=0.1, concurrency=1)
    async def stubborn(ctx: OperationContext) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

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

    @spine.operation("work.hang", timeout_s=0.1, concurrency=1)
    def hang(ctx: OperationContext) -> None:
        entered[ctx.params["n"]] += 1
        release.wait(30)

    async with spine:
        with capture_logs() as logs, Clocked() as calls:
            results = [
                await spine.execute("work.hang", tenant_id="acme", run_id="run-1", params={"n": n}) for n in range(10)
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


HANGS_FOR_EVER = """
import asyncio, sys, threading
from spine import Settings, Spine

spine = Spine(sys.argv[1], settings=Settings(drain_s=0.1))

@spine.operation("work.hang", timeout_s=0.1)
@spine.operation("work.long")
def hang(ctx):
    threading.Event().wait()

async def main():
    async with spine:
        await spine.execute("work.hang", tenant_id="acme")
        long = asyncio.ensure_future(spine.execute("work.long", tenant_id="acme"))
        while spine.health().decisions["allowed"] < 2:
            await asyncio.sleep(0.01)
        receipts = await spine.stop()
        print((await long).error_code, *(f"{receipt.child}:{receipt.end}" for receipt in receipts))

asyncio.run(main())
"""


async def test_a_thread_that_hangs_for_ever_keeps_neither_spine_nor_process_from_ending(sqlite_url: str) -> None:
    """The outcomes are recorded, the receipt says what is left behind, and the interpreter exits all the same."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", HANGS_FOR_EVER, sqlite_url],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()[-1]
    assert told == "INTERRUPTED coordinator:clean registry:leaked router:clean audit:clean"
    assert [row["error_code"] for row in found(sqlite_url, "outcome")] == ["TIMEOUT", "INTERRUPTED"]


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


# -- slow strangers


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


# -- the start and the stop


async def stubborn_load(spine: Spine, release: asyncio.Event, threads: threading.Event) -> list[asyncio.Future[Any]]:
    @spine.operation("load.hangs")
    async def hangs(ctx: OperationContext) -> None:
        await anyio.sleep_forever()

    @spine.operation("load.stubborn")
    async def stubborn(ctx: OperationContext) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    @spine.operation("load.sync")
    def sync(ctx: OperationContext) -> None:
        threads.wait(30)

    @spine.operation("load.narrow", concurrency=1)
    async def narrow(ctx: OperationContext) -> None:
        await anyio.sleep_forever()

    @spine.operation("load.nests")
    async def nests(ctx: OperationContext) -> OperationResult:
        return await ctx.execute("load.hangs")

    await spine.start()
    names = ["load.hangs", "load.stubborn", "load.sync", "load.narrow", "load.nests"]
    calls = [
        asyncio.ensure_future(spine.execute(name, tenant_id="acme", run_id="run-1")) for name in names for _ in range(6)
    ]
    # Five calls wait for the narrow operation's slot, six handlers have nested another.
    await until(lambda: spine.health().decisions["allowed"] == 30 - 5 + 6)
    return calls


async def test_a_stop_under_load_returns_within_its_deadline_with_a_receipt_for_each_child(sqlite_url: str) -> None:
    """Handlers that hang, nest, hold a thread or swallow their cancellation, and calls that wait for a slot.

    Everybody is answered, what ran is recorded as INTERRUPTED, and the record is intact.
    """
    spine = Spine(sqlite_url, settings=Settings(drain_s=0.2, stop_s=6))
    release, threads = asyncio.Event(), threading.Event()
    calls = await stubborn_load(spine, release, threads)
    with Clocked() as stop:
        receipts = await spine.stop()
    assert stop.took < 6 + 2
    assert [receipt.child for receipt in receipts] == CHILDREN
    assert {receipt.end for receipt in receipts} <= {"clean", "forced", "leaked"}
    assert receipts[-1].end == "clean"
    with anyio.fail_after(5):
        results = await ended(calls)
    codes = Counter(getattr(result, "error_code", type(result).__name__) for result in results)
    assert set(codes) <= {"INTERRUPTED", "NotRunning", "ActorCrashed", "TIMEOUT"}, codes
    assert codes["INTERRUPTED"] >= 6 * 3
    release.set()
    threads.set()
    outcomes = Counter(row["error_code"] for row in found(sqlite_url, "outcome"))
    assert set(outcomes) == {"INTERRUPTED"}
    assert outcomes["INTERRUPTED"] >= 6 + 6 + 1 + 12
    assert_intact(sqlite_url)
    with pytest.raises(NotRunning, match="is stopped"):
        await spine.execute("load.hangs", tenant_id="acme")


async def test_a_stop_that_has_hardly_any_time_still_returns_and_tells_what_it_left(sqlite_url: str) -> None:
    """Two tenths of a second against handlers that do not want to end: forced or leaked, but told, and nobody waits."""
    spine = Spine(sqlite_url, settings=Settings(drain_s=0.05, stop_s=0.2))
    release, threads = asyncio.Event(), threading.Event()
    calls = await stubborn_load(spine, release, threads)
    with Clocked() as stop:
        receipts = await spine.stop()
    assert stop.took < 0.2 + 6
    assert [receipt.child for receipt in receipts] == CHILDREN
    with anyio.fail_after(5):
        await ended(calls)
    release.set()
    threads.set()
    assert_intact(sqlite_url)


async def test_an_idle_spine_stops_at_once_and_leaves_nothing_behind(sqlite_url: str) -> None:
    """Every child clean; no task, no thread of the journal."""
    spine = Spine(sqlite_url)
    await spine.start()
    with Clocked() as stop:
        receipts = await spine.stop()
    assert [(receipt.child, receipt.end) for receipt in receipts] == [(child, "clean") for child in CHILDREN]
    assert stop.took < 2
    assert ours() == []
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("spine")])
    assert await spine.stop() == []


@pytest.mark.parametrize("timeout_s", [30, 0.8])
async def test_a_stop_records_the_interruption_of_a_handler_that_swallows_it(sqlite_url: str, timeout_s: float) -> None:
    """It will not end, but its caller hears INTERRUPTED, durably, and the journal's decision is closed; it is leaked.

    However near its own deadline is.
    """
    spine, release = Spine(sqlite_url, settings=Settings(drain_s=0.1)), asyncio.Event()

    @spine.operation("work.stubborn", timeout_s=timeout_s)
    async def stubborn(ctx: OperationContext) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    await spine.start()
    call = asyncio.ensure_future(spine.execute("work.stubborn", tenant_id="acme", run_id="run-1"))
    await until(lambda: spine.health().decisions["allowed"] == 1)
    with Clocked() as stop:
        receipts = await spine.stop()
    assert stop.took < 10
    assert {receipt.child: receipt.end for receipt in receipts}["registry"] == "leaked"
    result = await call
    assert (result.error_code, result.durable) == ("INTERRUPTED", True)
    assert not unanswered(rows(sqlite_url))
    (outcome,) = found(sqlite_url, "outcome")
    assert outcome["error_code"] == "INTERRUPTED"
    release.set()
    await until(lambda: ours() == [])
    assert_intact(sqlite_url)


async def test_running_work_may_end_within_the_drain_time(sqlite_url: str) -> None:
    """The stop closes the door and waits for what is inside, nested calls included."""
    spine, gate = Spine(sqlite_url, settings=Settings(drain_s=20)), asyncio.Event()

    @spine.operation("work.outer")
    async def outer(ctx: OperationContext) -> OperationResult:
        await gate.wait()
        return await ctx.execute("work.inner")

    @spine.operation("work.inner")
    async def inner(ctx: OperationContext) -> dict[str, str]:
        return {"nested": "while stopping"}

    await spine.start()
    running = asyncio.ensure_future(spine.execute("work.outer", tenant_id="acme"))
    await until(lambda: spine.health().decisions["allowed"] == 1)
    stopping = asyncio.ensure_future(spine.stop())
    await asyncio.sleep(0)
    with pytest.raises(NotRunning):
        await spine.execute("work.inner", tenant_id="acme")
    gate.set()
    assert (await running).data == {"nested": "while stopping"}
    with Clocked() as rest:
        await stopping
    assert rest.took < 2


async def test_a_caller_in_the_line_for_a_credit_does_not_hold_up_the_stop(sqlite_url: str) -> None:
    """It was its turn in the very step in which the stop began: its credit goes back, the drain is not held up."""
    spine, release = Spine(sqlite_url, settings=Settings(credits=1, drain_s=8)), asyncio.Event()

    @spine.operation("work.hold")
    async def hold(ctx: OperationContext) -> None:
        await release.wait()

    await spine.start()
    first = asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme"))
    await until(lambda: spine.health().decisions["allowed"] == 1)
    second = asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme", wait=True))
    go = asyncio.get_running_loop().create_future()

    async def stop() -> list[Any]:
        await go
        return await spine.stop()

    stopping = asyncio.ensure_future(stop())
    await anyio.wait_all_tasks_blocked()
    go.set_result(None)
    first.cancel()
    release.set()
    with Clocked() as rest:
        assert len(await stopping) == 4
    assert rest.took < 4
    outcomes = await ended([first, second])
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert isinstance(outcomes[1], NotRunning)


@contextmanager
def locked(url: str, seconds: float) -> Iterator[None]:
    """Another process's connection holds the write lock for so long."""
    with closing(sqlite3.connect(file_of(url), isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        unlock = threading.Timer(seconds, other.execute, ["ROLLBACK"])
        unlock.start()
        try:
            yield
        finally:
            unlock.join()


async def test_a_start_that_is_given_up_leaves_nothing_running(sqlite_url: str) -> None:
    """Another process holds the database's lock, the caller does not wait for it."""
    async with Spine(sqlite_url):
        pass
    spine = Spine(sqlite_url)
    with capture_logs() as logs:
        with locked(sqlite_url, 0.6), pytest.raises(TimeoutError):
            await asyncio.wait_for(spine.start(), 0.2)
        await until(lambda: ours() == [])
    # What had started was stopped; it did not crash on what was taken away under it.
    assert not [line for line in logs if line["event"] in ("spine.actor.crashed", "spine.failed")]
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("spine")])
    async with Spine(sqlite_url) as again:
        assert (await again.start_run("run-1", tenant_id="acme")).allowed


async def test_a_stop_while_actors_are_restarting_keeps_its_deadline(sqlite_url: str) -> None:
    """Registry and audit actor are down together; the first one back asks the other. Receipts all the same."""
    spine = Spine(sqlite_url, settings=Settings(stop_s=3, drain_s=0.2))
    await spine.start()
    incarnation("registry").cancel()
    await until(lambda: spine.health().actors["registry"] != "ready")
    incarnation("audit").cancel()
    await until(lambda: spine.health().actors["audit"] != "ready")
    with Clocked() as stop:
        receipts = await spine.stop()
    assert stop.took < 3 + 3
    assert [receipt.child for receipt in receipts] == CHILDREN
    assert ours() == []


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
