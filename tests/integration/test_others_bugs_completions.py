"""What went wrong with other people's sagas and must not here; each test names the public issue it comes from."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import Any

import anyio
import pytest

from spine import OperationContext
from spine.kernel.clock import VirtualClock
from tests.governed import connect, intact, journal, query, running, until
from tests.participants import (
    Held,
    Pause,
    Remote,
    World,
    acks,
    complete,
    failure,
    hang,
    loses,
    moves,
    over,
    raises,
    refuses,
    steps,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


@pytest.mark.parametrize(
    "moment",
    ["call.forward.before", "step.done.after", "tx.abort.before", "tx.abort.after", "call.rollback.before"],
)
async def test_a_cancelled_caller_does_not_cancel_the_compensation(sqlite_url: str, world: World, moment: str) -> None:
    """temporal sdk-java#305: compensations were skipped when the workflow was cancelled.

    Here a cancelled caller only stops waiting: wherever the transaction stands, it goes on and undoes what it must.
    """
    pause = Pause(moment)
    spine = over(sqlite_url, Remote(world), Remote(world, "no", after=["pay"], forward=refuses()), failpoint=pause)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await pause.reached.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        pause.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["ABORTED"])
    assert steps(sqlite_url) == {"pay": "ROLLED_BACK", "no": "ROLLED_BACK"}
    assert world.told("rollback") == ["rollback no", "rollback pay"]
    assert world.standing() == []


@pytest.mark.parametrize(
    ("forward", "state"),
    [
        (loses(hang), "unknown"),
        (loses(raises(ConnectionError("the reply was lost"))), "unknown"),
        (loses(refuses("LATE", "refused, but booked")), "refused"),
        (loses(raises(asyncio.CancelledError())), "unknown"),
    ],
    ids=["times out", "fails", "refuses", "is cancelled"],
)
async def test_a_step_that_may_have_happened_is_undone_too(
    sqlite_url: str, world: World, forward: Any, state: str
) -> None:
    """Sagas that undo only what is DONE lose the compensation of a step that took effect and did not say so.

    Here everything that was sent is undone: UNKNOWN and REFUSED as well, by a rollback that tolerates never-applied.
    """
    spine = over(sqlite_url, Remote(world, forward=forward, timeout_s=0.05, attempts=1))
    async with running(spine):
        await failure(spine)
    assert f"{state} pay" in moves(sqlite_url)
    assert world.told() == ["forward pay", "rollback pay"]
    assert world.standing() == []
    assert acks(sqlite_url, "pay") == [("pay", "FAILED"), ("pay", "ROLLED_BACK")]


async def test_a_rollback_is_by_the_effects_id_and_not_by_equal_values(sqlite_url: str, world: World) -> None:
    """seata#4997: a rollback fired days later, undoing another's change, because the row's values matched again.

    Here a system is told which effect to undo: days later an equal one of another run stands untouched.
    """
    same = {"account": "1", "cents": 500}
    pay = Remote(world, rollback=raises(OSError("closed")), describe=lambda run: same)
    no = Remote(world, "no", after=["pay"], forward=refuses())
    clock = VirtualClock(1_750_000_000_000_000)
    spine = over(sqlite_url, pay, no, retry=over(sqlite_url)._settings.retry)
    async with running(spine):
        error = await failure(spine, "run-1")
    (first,) = world.effects("forward", "pay")
    await clock.advance(4 * 86_400)
    no.forwards, pay.rollbacks = well, well
    later = over(sqlite_url, pay, no)
    async with running(later):
        done = await complete(later, "run-2")
        (_, second) = world.effects("forward", "pay")
        assert second.descriptor == first.descriptor == same
        assert done.is_complete and error.transaction_id is not None
        await later.retry(error.transaction_id, reason="days later", actor="op")
        await until(lambda: transactions(sqlite_url, "run-1") == ["ABORTED"])
    assert {effect.id for effect in world.effects("rollback", "pay")} == {first.id}
    assert second.id in world.live
    assert first.id not in world.live


async def test_an_empty_id_is_no_id(sqlite_url: str, world: World) -> None:
    """dbos-transact#759: a workflow under an empty id was run again and again for a month.

    Here an empty or blank run, tenant or idempotency key is refused where it comes in; and the empty completion key,
    which is the default, is one key like any other: ninety-six completions under it are one transaction.
    """
    spine = over(sqlite_url, Remote(world))

    @spine.operation("desk.pay")
    async def pay(ctx: OperationContext) -> dict[str, Any]:
        world.tombs.add("the handler ran")
        return {}

    async with running(spine):
        for empty in ("", " ", "\t", "\u200b"):
            for field in ("run_id", "tenant_id"):
                given = {"run_id": "run-1", "tenant_id": "acme", field: empty}
                error = await failure(spine, **given)
                assert (error.code, error.phase) == ("INVALID_PARAMS", "NOT_STARTED"), (field, empty)
                assert field in error.message
                assert not (await spine.start_run(**given)).allowed
            result = await spine.execute("desk.pay", tenant_id="acme", idempotency_key=empty)
            assert result.error_code == "INVALID_PARAMS", empty
        assert world.calls == [] and world.tombs == set()
        assert query(sqlite_url, "SELECT count(*) FROM runs") == [(0,)]
        results = [await complete(spine) for _ in range(96)]
    assert len({result.transaction_id for result in results}) == 1
    assert world.told() == ["forward pay"]
    assert transactions(sqlite_url) == ["COMMITTED"]


@pytest.mark.usefixtures("brief")
async def test_two_spines_that_are_configured_alike_are_two(sqlite_url: str, world: World) -> None:
    """dbos-transact#804: two executors under one id left each other's workflows PENDING, or took them for their own.

    Here nobody names an instance: each start is one of its own, so a predecessor's work is found, and a twin's is not.
    """
    held = Held()
    first = over(sqlite_url, Remote(world, forward=held), seed=7, drain_s=0.01)
    twin = over(sqlite_url, Remote(world, forward=held), seed=7)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("actors.recovery.LEASE_S", 10.0)
        async with running(twin, first):
            call = asyncio.ensure_future(complete(first))
            await held.reached.wait()
            await until(lambda: twin.health().transactions["in_flight"] == 1)
            for _ in range(10):
                await asyncio.sleep(0.02)
            # Alive and alike, and it leaves the other's transaction alone.
            assert journal(sqlite_url, "tx.claimed") == []
            held.let_go.set()
            assert (await call).is_complete
    assert world.told() == ["forward pay"]
    instances = {body["instance"] for body in journal(sqlite_url, "tx.begun")}
    assert instances == {first._system.dependencies.instance}  # type: ignore[union-attr]
    assert instances != {twin._system.dependencies.instance}  # type: ignore[union-attr]


@pytest.mark.usefixtures("brief")
async def test_a_locked_database_is_waited_for_and_is_nobodys_error(sqlite_url: str, world: World) -> None:
    """dbos-transact#761: a lock that met a check before the work marked the whole workflow as an error.

    Here a lock held by somebody else before, between and at the end of the steps delays them, and nothing fails.
    """
    locked = 0

    async def under_lock(do: Any) -> Any:
        """Answer at once, but leave the database locked for a while."""
        nonlocal locked
        connection = connect(sqlite_url)
        connection.execute("BEGIN IMMEDIATE")
        locked += 1

        async def unlock() -> None:
            await asyncio.sleep(0.3)
            connection.execute("COMMIT")
            connection.close()

        group.start_soon(unlock)
        return do()

    pay, ship = Remote(world, forward=under_lock), Remote(world, "ship", after=["pay"], forward=under_lock)
    spine = over(sqlite_url, pay, ship, Remote(world, "no", after=["ship"], rollback=under_lock))
    async with running(spine), anyio.create_task_group() as group:
        with closing(sqlite3.connect(sqlite_url.partition("///")[2], isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            call = asyncio.ensure_future(complete(spine))
            await until(lambda: spine.health().messages.in_flight)
            await asyncio.sleep(0.2)
            other.execute("COMMIT")
        done = await call
        assert done.all_domains_succeeded
        spine._participants[-1].domain.forwards = refuses()  # type: ignore[union-attr]
        error = await failure(spine, "run-2")
        assert error.code == "NO_FUNDS"
        assert spine.health().ok
    assert locked == 5
    assert [transactions(sqlite_url, run_id) for run_id in ("run-1", "run-2")] == [["COMMITTED"], ["ABORTED"]]
    assert len(world.calls) == 9
    intact(sqlite_url)


@pytest.mark.usefixtures("brief")
async def test_a_rollback_that_never_succeeds_is_not_tried_for_ever(sqlite_url: str, world: World) -> None:
    """seata#5077: a compensation that could not succeed was repeated without end.

    Here it is tried so many times and parked for an operator; no restart and no passing of time begins again.
    """
    pay = Remote(world, rollback=raises(OSError("closed for good")))
    no = Remote(world, "no", after=["pay"], forward=refuses())
    for start in range(3):
        spine = over(sqlite_url, pay, no)
        async with running(spine):
            error = await failure(spine)
            assert error.phase == "PARKED"
            await until(lambda spine=spine: spine.health().transactions["parked_now"] == 1)
            for _ in range(10):
                await asyncio.sleep(0.02)
        assert len(world.effects("rollback", "pay")) == 3, start
    assert transactions(sqlite_url) == ["PARKED"]
    assert journal(sqlite_url, "tx.claimed") == []


@pytest.mark.usefixtures("brief")
async def test_two_that_both_believe_they_own_a_transaction_do_not_both_end_it(sqlite_url: str, world: World) -> None:
    """azure-functions-durable-extension#3375: after a split brain two workers drove one orchestration to two ends.

    Here the one that commits and the one that aborts cannot both be recorded: the epoch of each write decides.
    """
    pause = Pause("tx.commit.before")
    old = over(sqlite_url, Remote(world), failpoint=pause)
    new = over(sqlite_url, Remote(world), Remote(world, "other"))
    async with running(old):
        call = asyncio.ensure_future(complete(old))
        await pause.reached.wait()
        async with running(new):
            # It finds the lease over, and everything done but the commit.
            await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
            pause.let_go.set()
            done = await call
            assert done.transaction_id == (await complete(new)).transaction_id
    assert len(journal(sqlite_url, "tx.committed")) == 1
    assert [body["epoch"] for body in journal(sqlite_url, "tx.committed")] == [2]
    assert query(sqlite_url, "SELECT count(*) FROM incidents") == [(1,)]
    assert len(journal(sqlite_url, "event")) == 1
    assert world.told() == ["forward pay"]
    intact(sqlite_url)
