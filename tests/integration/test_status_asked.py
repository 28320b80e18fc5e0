"""What a domain's ``status`` is asked for: by who goes on with what another began, before it sends or undoes again."""

from __future__ import annotations

import asyncio
import time

import pytest

from spine.kernel.clock import VirtualClock
from tests.governed import intact, journal, running, until
from tests.participants import (
    Probed,
    Remote,
    World,
    complete,
    failure,
    over,
    raises,
    refuses,
    steps,
    then,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


@pytest.mark.parametrize("undone", [False, True], ids=["applied", "tombstoned"])
async def test_who_takes_over_asks_before_it_sends_again(sqlite_url: str, world: World, undone: bool) -> None:
    """What is applied is sent once more, for its answer; what was undone meanwhile is not sent, but the run aborted."""
    reached, let_go = asyncio.Event(), asyncio.Event()

    async def failpoint(moment: str) -> None:
        if moment == "step.done.before" and not reached.is_set():
            reached.set()
            await let_go.wait()

    # Everybody else sees that its lease was over long ago.
    dead = over(sqlite_url, Probed(world), failpoint=failpoint, clock=VirtualClock(time.time_ns() // 1000 - 10**9))
    alive = over(sqlite_url, Probed(world))
    end = "ABORTED" if undone else "COMMITTED"
    async with running(dead):
        caller = asyncio.ensure_future(complete(dead))
        await reached.wait()
        if undone:
            world.tombs.update(world.live)
            world.live.clear()
        async with running(alive):
            await until(lambda: transactions(sqlite_url) == [end])
        caller.cancel()
        let_go.set()
        await asyncio.wait([caller])
    assert world.told() == ["forward pay", "status pay", "rollback pay" if undone else "forward pay"]
    assert [body["code"] for body in journal(sqlite_url, "tx.aborted")] == (["TOMBSTONED"] if undone else [])
    intact(sqlite_url)


async def test_what_is_absent_is_undone_all_the_same(sqlite_url: str, world: World) -> None:
    """A late forward may follow: only a tombstone stands for a rollback."""
    pay = Probed(world, forward=raises(OSError("line noise")), attempts=1)
    pay.rollbacks = then(*[raises(OSError("the bank is closed"))] * 3, well)
    spine = over(sqlite_url, pay, Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(spine):
        error = await failure(spine)
        assert steps(sqlite_url) == {"pay": "PARKED", "no": "PLANNED"}
        await spine.retry(str(error.transaction_id), reason="it opened", actor="op")
        await until(lambda: transactions(sqlite_url) == ["ABORTED"])
    assert world.told("status", "rollback") == [*["rollback pay"] * 3, "status pay", "rollback pay"]
    (effect,) = {effect.id for effect in world.effects("rollback", "pay")}
    assert world.tombs == {effect}
    intact(sqlite_url)
