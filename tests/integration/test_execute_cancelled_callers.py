"""A caller that is cancelled loses nothing that has started and leaves nothing behind."""

from __future__ import annotations

import asyncio
from functools import partial

import anyio
import pytest

from tests.governed import intact, journal, running, until
from tests.integration.desk import Desk, complete, sound

pytestmark = pytest.mark.anyio


async def test_a_caller_cancelled_before_the_start_keeps_it_from_starting(desk: Desk) -> None:
    """It waited for a slot: when that comes, the call is recorded as CANCELLED and its handler does not run."""
    async with running(desk.spine), anyio.create_task_group() as group:
        group.start_soon(partial(desk.execute, "desk.single"))
        await until(lambda: desk.entered == 1)
        caller = asyncio.create_task(desk.execute("desk.single", run_id="run-1", idempotency_key="k"))
        while not (await desk.spine.status())["operations"]["desk.single"]["waiting"]:
            await anyio.lowlevel.checkpoint()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        desk.leave.set()
        await until(lambda: any(body["code"] == "CANCELLED" for body in journal(desk.url, "decision")))
        assert desk.entered == 1
        # What was cancelled has not used its key up.
        assert sound(await desk.execute("desk.single", run_id="run-1", idempotency_key="k")).success
    cancelled = [body for body in journal(desk.url, "decision") if body["code"] == "CANCELLED"]
    assert [(body["run_id"], body["final"], body["key"]) for body in cancelled] == [("run-1", True, None)]
    assert len(journal(desk.url, "outcome")) == 2


async def test_a_caller_cancelled_after_the_start_does_not_stop_it(desk: Desk) -> None:
    """Started work finishes and is recorded, whoever still listens."""
    async with running(desk.spine):
        with anyio.move_on_after(0.2) as scope:
            await desk.execute("desk.slow", run_id="run-1")
        assert scope.cancelled_caught
        assert (desk.entered, desk.left) == (1, 0)
        desk.leave.set()
        await until(lambda: journal(desk.url, "outcome"))
    assert desk.left == 1
    (outcome,) = journal(desk.url, "outcome")
    assert outcome["success"]


async def test_a_completion_whose_caller_is_cancelled_is_all_or_nothing_and_known_afterwards(desk: Desk) -> None:
    """Cancelled at any moment: completing again gives one committed transaction."""
    async with running(desk.spine):
        for number in range(20):
            caller = asyncio.create_task(complete(desk, f"run-{number}"))
            for _ in range(number):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.wait([caller])
        for number in range(20):
            assert (await complete(desk, f"run-{number}")).is_complete
    assert len(journal(desk.url, "tx.committed")) == 20
    intact(desk.url)


async def test_waiting_callers_that_give_up_leave_no_credit_behind(sqlite_url: str) -> None:
    """Cancelled in the queue for a credit, in every moment of its hand-over: all credits come back."""
    desk = Desk(sqlite_url, credits=3)
    async with running(desk.spine):
        for yields in range(12):
            desk.leave.clear()
            entered = desk.entered
            holders = [asyncio.create_task(desk.execute("desk.slow")) for _ in range(3)]
            await until(lambda entered=entered: desk.entered == entered + 3)
            waiters = [asyncio.create_task(desk.execute(wait=True)) for _ in range(3)]
            await asyncio.sleep(0)
            desk.leave.set()
            for _ in range(yields):
                await asyncio.sleep(0)
            for waiter in waiters[:2]:
                waiter.cancel()
            await asyncio.wait([*holders, *waiters[:2]])
            assert sound(await waiters[2]).success
            await until(lambda: desk.credits_in_use == 0)
