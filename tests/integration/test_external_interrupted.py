"""The caller goes away, the Spine stops or the coordinator is killed: a completion under way still ends, once."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from spine import TransactionFailed
from spine.governance.completion import CompleteRun
from spine.settings import Retry
from tests.governed import intact, journal, query, running, until
from tests.laws.world import kill
from tests.participants import Held, Remote, World, complete, hang, moves, over, refuses, steps, transactions, well

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


@pytest.mark.parametrize("good", [True, False], ids=["committing", "undoing"])
async def test_a_completion_goes_on_when_its_caller_is_cancelled(sqlite_url: str, world: World, good: bool) -> None:
    """Its end is in the record and is what the next caller is told."""
    held = Held()
    pay = Remote(world, forward=held if good else well, rollback=held)
    no = Remote(world, "no", after=["pay"], forward=well if good else refuses())
    spine = over(sqlite_url, pay, no)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await held.reached.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert transactions(sqlite_url) == ["EXECUTING" if good else "COMPENSATING"]
        held.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["COMMITTED" if good else "ABORTED"])
        if good:
            assert (await complete(spine)).is_complete
        else:
            assert (await spine.why("run-1")).verdict == "rolled_back"
    assert len(journal(sqlite_url, "tx.begun")) == 1
    assert world.standing() == (["no", "pay"] if good else [])
    intact(sqlite_url)


async def test_a_completion_goes_on_when_its_caller_has_waited_long_enough(sqlite_url: str, world: World) -> None:
    """The caller is told that started work goes on; what it came to is in the record."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=held))
    told: list[BaseException | None] = []
    request = CompleteRun(run_id="run-1", tenant_id="acme", run_status="succeeded")
    async with running(spine):
        spine.post(request, timeout_s=0.3, on_done=lambda value, error: told.append(error))
        await held.reached.wait()
        await until(lambda: told)
        (error,) = told
        assert isinstance(error, TransactionFailed)
        assert error.code == "TIMEOUT"
        assert "goes on" in error.message
        held.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
        assert (await complete(spine)).is_complete
    assert world.told() == ["forward pay"]


@pytest.mark.parametrize("applied", [True, False])
async def test_a_stop_gives_a_call_under_way_up_and_undoes_it(sqlite_url: str, world: World, applied: bool) -> None:
    """Within the stop the effect is UNKNOWN, undone and recorded; the caller is told; the next start finds no work."""
    reached = asyncio.Event()

    async def forward(do: Any) -> Any:
        if applied:
            do()
        reached.set()
        await hang(do)

    spine = over(sqlite_url, Remote(world), Remote(world, "ship", after=["pay"], forward=forward), drain_s=0.05)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await reached.wait()
        receipts = await spine.stop()
        with pytest.raises(TransactionFailed) as raised:
            await caller
    assert [receipt.end for receipt in receipts] == ["clean"] * 4
    assert (raised.value.code, raised.value.failed_domain) == ("INTERRUPTED", "ship")
    assert transactions(sqlite_url) == ["ABORTED"]
    assert [body["interrupted"] for body in journal(sqlite_url, "tx.aborting", "tx.aborted")] == [True, True]
    assert moves(sqlite_url)[-7:] == [
        "unknown ship", "aborting", "undo ship", "undone ship", "undo pay", "undone pay", "aborted"
    ]  # fmt: skip
    assert world.standing() == []
    later = over(sqlite_url, Remote(world), Remote(world, "ship", after=["pay"]))
    async with running(later):
        done = await complete(later)
    assert done.is_complete
    assert transactions(sqlite_url) == ["ABORTED", "COMMITTED"]
    intact(sqlite_url)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "fails"])
async def test_a_stop_during_a_rollback_leaves_it_to_the_next_start(sqlite_url: str, world: World, hangs: bool) -> None:
    """The stop does not wait for ever, nor does it park what only lacked time: the next Spine goes on and ends it."""
    reached = asyncio.Event()

    async def rollback(do: Any) -> Any:
        reached.set()
        if hangs:
            await hang(do)
        raise OSError("away")

    slow = Retry(attempts=100, first_s=0.02, most_s=0.02)
    no = Remote(world, "no", after=["pay"], forward=refuses())
    spine = over(sqlite_url, Remote(world, rollback=rollback), no, drain_s=0.05, retry=slow)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await reached.wait()
        with anyio.fail_after(10):
            await spine.stop()
        with pytest.raises((TransactionFailed, asyncio.CancelledError)) as raised:
            await caller
    if isinstance(raised.value, TransactionFailed):
        assert raised.value.code in ("IN_FLIGHT", "INTERRUPTED", "JOURNAL_UNAVAILABLE")
    assert transactions(sqlite_url) == ["COMPENSATING"]
    assert steps(sqlite_url) == {"pay": "RB_INTENT", "no": "ROLLED_BACK"}
    later = over(sqlite_url, Remote(world), Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(later):
        await until(lambda: transactions(sqlite_url) == ["ABORTED"])
        await until(lambda: later.health().transactions["recovered"] == 1)
    assert world.standing() == []
    assert world.effects("rollback", "pay")[-1].epoch == 2
    assert [move for move in moves(sqlite_url) if move.startswith(("claimed", "aborted"))] == ["claimed", "aborted"]
    intact(sqlite_url)


@pytest.mark.usefixtures("brief")
async def test_whoever_ends_it_knows_that_nothing_but_a_stop_undid_it(sqlite_url: str, world: World) -> None:
    """The stop gives the call up and has no time for its rollback: the decision says why, and so does the end."""
    reached = asyncio.Event()

    async def forward(do: Any) -> Any:
        reached.set()
        await hang(do)

    spine = over(sqlite_url, Remote(world, forward=forward, rollback=hang), drain_s=0.05)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await reached.wait()
        await spine.stop()
        with pytest.raises((TransactionFailed, asyncio.CancelledError)):
            await caller
    assert transactions(sqlite_url) == ["COMPENSATING"]
    later = over(sqlite_url, Remote(world))
    async with running(later):
        await until(lambda: transactions(sqlite_url) == ["ABORTED"])
    assert [body["interrupted"] for body in journal(sqlite_url, "tx.aborting", "tx.aborted")] == [True, True]
    intact(sqlite_url)


async def test_a_killed_coordinator_leaves_its_transactions_to_its_next_incarnation(
    sqlite_url: str, world: World
) -> None:
    """Killed while one rollback and one forward are under way: both end, each once, and new work is taken."""
    stuck = Held()
    reached: set[str] = set()

    async def forward(do: Any) -> Any:
        run_id = world.calls[-1].effect.run_id
        if run_id == "forward" and run_id not in reached:
            reached.add(run_id)
            do()
            await hang(do)
        return do()

    async def rollback(do: Any) -> Any:
        if not stuck.reached.is_set():
            stuck.reached.set()
            await hang(do)
        return do()

    no = Remote(world, "no", after=["pay"], forward=refuses())
    spine = over(sqlite_url, Remote(world, forward=forward, rollback=rollback), no)
    ends: dict[str, BaseException | None] = {}

    async def one(run_id: str) -> None:
        try:
            await complete(spine, run_id)
        except Exception as error:
            ends[run_id] = error

    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(one, "back")
        await stuck.reached.wait()
        group.start_soon(one, "forward")
        await until(lambda: reached)
        await kill(spine, "coordinator")
        await until(lambda: set(ends) == {"back", "forward"})
        await until(lambda: not query(sqlite_url, "SELECT 1 FROM transactions WHERE state <> 'ABORTED'"))
        assert spine.health().ok
        no.forwards = well
        for run_id in ("back", "forward", "new"):
            assert (await complete(spine, run_id)).is_complete
    assert world.standing() == ["no"] * 3 + ["pay"] * 3
    assert transactions(sqlite_url, "back") == transactions(sqlite_url, "forward") == ["ABORTED", "COMMITTED"]
    claimed = [body["run_id"] for body in journal(sqlite_url, "tx.claimed")]
    assert claimed == ["back"]
    intact(sqlite_url)
