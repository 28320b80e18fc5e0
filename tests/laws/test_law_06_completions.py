"""Law 6 again: nothing waits for ever. A completion waits for another one, for a domain, for a publisher: bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from spine import Spine, TransactionFailed
from spine.governance.transactions import CompleteRun
from spine.journal.reader import JournalReader
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import Overloaded
from spine.settings import Retry
from tests.governed import journal, query, running, until
from tests.participants import Held, Remote, World, complete, over, refuses, transactions

pytestmark = pytest.mark.anyio


@pytest.fixture
def world() -> World:
    return World()


def at_work(spine: Spine) -> int:
    """How many completions its coordinator is at work on."""
    tasks = spine._system.supervisor._children["coordinator"].actor._tasks._tasks  # type: ignore[union-attr]
    return len([task for task in tasks if task.get_name() == "CompleteRun"])


async def test_who_waits_for_another_completion_waits_no_longer_than_its_caller(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's domain takes its time; when the second one's caller has gone nothing of it is left."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=held))
    async with running(spine):
        first = asyncio.ensure_future(complete(spine))
        await held.reached.wait()
        monkeypatch.setattr(CompleteRun, "timeout_s", 0.2)
        with pytest.raises(TransactionFailed, match="no reply within its deadline"):
            await complete(spine)
        await until(lambda: at_work(spine) == 1)
        held.let_go.set()
        assert (await first).is_complete


async def test_a_stop_does_not_wait_for_a_transaction_that_another_spine_drives(sqlite_url: str, world: World) -> None:
    """Its caller is told that the transaction goes on, and hears so before the stop would cut it off."""
    held = Held()
    drives, waits = over(sqlite_url, Remote(world, forward=held)), over(sqlite_url, drain_s=0.1)
    async with running(drives):
        first = asyncio.ensure_future(complete(drives))
        await held.reached.wait()
        async with running(waits):
            second = asyncio.ensure_future(complete(waits))
            await until(lambda: waits.health().messages.in_flight)
            with anyio.fail_after(10):
                await waits.stop()
            with pytest.raises(TransactionFailed) as told:
                await second
        assert (told.value.code, told.value.phase) == ("IN_FLIGHT", "FAILED")
        assert transactions(sqlite_url) == ["EXECUTING"]
        held.let_go.set()
        assert (await first).is_complete


async def test_a_stop_gives_a_rollback_that_hangs_its_time_and_no_more(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator ends by itself, long before it would be cut off; the rollback is left to the next start."""
    monkeypatch.setattr("actors.coordinator.STOP_S", 0.2)
    reached = asyncio.Event()

    async def hangs(do: Callable[[], Any]) -> Any:
        reached.set()
        await asyncio.Event().wait()

    spine = over(sqlite_url, Remote(world, forward=refuses(), rollback=hangs), drain_s=0.1)
    async with running(spine):
        caller = asyncio.ensure_future(complete(spine))
        await reached.wait()
        receipts = {receipt.child: receipt for receipt in await spine.stop()}
        await asyncio.wait([caller])
        assert caller.cancelled() or caller.exception() is not None
    assert receipts["coordinator"].end == "clean"
    assert receipts["coordinator"].seconds < 2
    assert transactions(sqlite_url) == ["COMPENSATING"]


async def test_who_waits_for_another_spines_transaction_waits_no_longer_than_its_caller(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go on looking at the journal for somebody who has gone."""
    held = Held()
    drives, waits = over(sqlite_url, Remote(world, forward=held)), over(sqlite_url)
    async with running(drives, waits):
        first = asyncio.ensure_future(complete(drives))
        await held.reached.wait()
        monkeypatch.setattr(CompleteRun, "timeout_s", 0.2)
        with pytest.raises(TransactionFailed, match="no reply within its deadline"):
            await complete(waits)
        await until(lambda: at_work(waits) == 0)
        held.let_go.set()
        assert (await first).is_complete


async def test_completions_that_nobody_waits_for_any_more_are_bounded(sqlite_url: str, world: World) -> None:
    """Started work goes on without its caller, and keeps its place: those who come when there is none are told."""
    gate = asyncio.Semaphore(0)

    async def forward(do: Callable[[], Any]) -> Any:
        await gate.acquire()
        return do()

    spine = over(sqlite_url, Remote(world, forward=forward, timeout_s=60.0), credits=1)
    async with running(spine):
        for n in range(100):
            caller = asyncio.ensure_future(complete(spine, f"run-{n}"))
            await until(lambda caller=caller, n=n: caller.done() or len(world.calls) > n)
            if caller.done():
                break
            caller.cancel()
            await asyncio.wait([caller])
        assert "coordinator runs 66 tasks already" in str(caller.exception())
        for _ in range(at_work(spine) + 1):
            gate.release()
        await until(lambda: at_work(spine) == 0)
        assert (await complete(spine, "one more")).is_complete
    # All at once they had more to record than there are credits: none was turned away.
    assert [body["kind"] for body in journal(sqlite_url, "tx.claimed")] == []


async def test_calls_under_way_to_domains_are_bounded(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight completions at once where two calls may run: never more than two do, and all of them commit."""
    monkeypatch.setattr("actors.effect_calls.CALLS_MOST", 2)
    under_way, most = 0, 0

    async def forward(do: Callable[[], Any]) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(20):
            await asyncio.sleep(0)
        under_way -= 1
        return do()

    retry = Retry(attempts=50, first_s=0.001, most_s=0.01)
    spine = over(sqlite_url, Remote(world, forward=forward, attempts=50), retry=retry)
    async with running(spine):
        done = await asyncio.gather(*(complete(spine, f"run-{n}") for n in range(8)))
    assert all(result.is_complete for result in done)
    assert most == 2


async def test_questions_about_contracts_are_bounded(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the journal is slow to read as many wait as may; the others are told at once, and later all is well."""
    monkeypatch.setattr("actors.audit.RECONCILING_MOST", 4)
    spine = over(sqlite_url)
    async with running(spine):
        await spine.start_run("run-1", tenant_id="acme")
        reader: Any = spine._system.reader
        read, let_go = reader.contract_rows, asyncio.Event()

        async def slowly(run_id: str) -> Any:
            await let_go.wait()
            return await read(run_id)

        reader.contract_rows = slowly
        asked = [asyncio.ensure_future(spine.reconcile("run-1")) for _ in range(10)]
        await until(lambda: sum(question.done() for question in asked) >= 6)
        let_go.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert len(refused) >= 6
        assert {str(error) for error in refused} == {"audit runs 4 tasks already: ask again later"}
        assert (await spine.reconcile("run-1")).overall == "INCOMPLETE"


async def test_takeovers_at_a_time_are_bounded(sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten transactions are left by one Spine: the next one reads and claims two at a time, until all are ended."""
    monkeypatch.setattr("actors.takeover.AT_ONCE", 2)
    monkeypatch.setattr("actors.takeover.TICK_S", 0.02)
    read, under_way, most = JournalReader.run_rows, 0, 0

    async def counted(self: JournalReader, run_id: str, *kinds: str) -> Any:
        nonlocal under_way, most
        if "tx.claimed" not in kinds:
            return await read(self, run_id, *kinds)
        under_way += 1
        most = max(most, under_way)
        try:
            return await read(self, run_id, *kinds)
        finally:
            under_way -= 1

    held = Held()
    # Everybody else sees that its lease was over long ago.
    gone = VirtualClock(time.time_ns() // 1000 - 600_000_000)
    left = over(sqlite_url, Remote(world, forward=held), clock=gone)
    async with running(left):
        callers = [asyncio.ensure_future(complete(left, f"run-{n}")) for n in range(10)]
        await until(lambda: len(world.calls) == 10)
        monkeypatch.setattr(JournalReader, "run_rows", counted)
        taking = over(sqlite_url, Remote(world))
        async with running(taking):
            await until(lambda: query(sqlite_url, "SELECT DISTINCT state FROM transactions") == [("COMMITTED",)])
        for caller in callers:
            caller.cancel()
        held.let_go.set()
        await asyncio.wait(callers)
    assert most == 2
