"""Law 6, nothing waits for ever: a start can be given up, a stop keeps its deadline and tells of each child."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from spine import OperationContext, OperationResult, Spine
from spine.kernel.errors import NotRunning
from spine.settings import Settings
from tests.laws.waiting import CHILDREN, Clocked, locked, ours
from tests.laws.world import assert_intact, ended, found, incarnation, rows, unanswered, until
from tests.stubborn import swallow_cancellation

pytestmark = pytest.mark.anyio


async def stubborn_load(spine: Spine, release: asyncio.Event, threads: threading.Event) -> list[asyncio.Future[Any]]:
    @spine.operation("load.hangs")
    async def hangs(ctx: OperationContext) -> None:
        await anyio.sleep_forever()

    @spine.operation("load.stubborn")
    async def stubborn(ctx: OperationContext) -> None:
        await swallow_cancellation(release)

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
        await swallow_cancellation(release)

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


HANGS_FOR_EVER = """
import asyncio, sys, threading
from spine import Settings, Spine

spine = Spine(sys.argv[1], settings=Settings(drain_s=0.1))

@spine.operation("work.hang", timeout_s=1)
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
