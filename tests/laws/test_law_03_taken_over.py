"""Law 3 again: never half, whoever goes on with what another Spine left, and at whatever moment it took it over.

Who claims a transaction decides by what was written until its claim, and only under the very epoch it raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from spine import Refused, RunFacts, Spine, Write
from spine.kernel.clock import VirtualClock
from spine.settings import Retry
from tests.governed import intact, journal, running, until
from tests.participants import Remote, Sender, World, complete, failure, over, refuses, transactions, well

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stranded is looked for without waiting long."""
    monkeypatch.setattr("actors.takeover.TICK_S", 0.02)


@pytest.fixture
def world() -> World:
    return World()


class Stops:
    """A failpoint that stands still at each of its moments in turn, once, until it is told to go."""

    def __init__(self, *moments: str) -> None:
        self.left = list(moments)
        self.reached = {moment: asyncio.Event() for moment in moments}
        self.go = {moment: asyncio.Event() for moment in moments}

    async def __call__(self, moment: str) -> None:
        if self.left and moment == self.left[0]:
            self.left.pop(0)
            self.reached[moment].set()
            await self.go[moment].wait()


def late(minutes: float) -> VirtualClock:
    """The clock of a Spine whose lease was over long ago, as everybody else sees it."""
    return VirtualClock(time.time_ns() // 1000 - round(minutes * 60e6))


@asynccontextmanager
async def flowing(*clocks: VirtualClock) -> AsyncIterator[None]:
    """Let virtual time go on about as fast as real time."""

    async def flow() -> None:
        while True:
            for clock in clocks:
                await clock.advance(0.01)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(flow())
    try:
        yield
    finally:
        task.cancel()


def claims(url: str) -> list[int]:
    """The epochs under which the one transaction was claimed."""
    return [body["epoch"] for body in journal(url, "tx.claimed")]


def looks_at(spine: Spine) -> set[str]:
    """The transactions that this Spine is at work to take over."""
    return spine._system.supervisor._children["coordinator"].actor._takeover._known  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("forward", "first", "then", "calls", "state"),
    [
        (well, "step.done.before", "tx.commit.before", ["forward pay"], "COMMITTED"),
        (refuses(), "tx.abort.before", "step.undo.before", ["forward pay", "rollback pay"], "ABORTED"),
    ],
    ids=["a step is done", "the abort is decided"],
)
async def test_who_takes_over_goes_on_from_what_was_written_until_its_claim(
    sqlite_url: str, world: World, forward: Any, first: str, then: str, calls: list[str], state: str
) -> None:
    """Between its look and its claim the one before records a move: it is not made again, and one claim is enough."""
    slow, quick, clock = Stops(first, then), Stops("tx.claim.before"), late(10)
    old = over(sqlite_url, Remote(world, forward=forward), failpoint=slow, clock=clock)
    new = over(sqlite_url, Remote(world, forward=forward), failpoint=quick)
    async with running(old), flowing(clock):
        caller = asyncio.ensure_future(complete(old) if state == "COMMITTED" else failure(old))
        await slow.reached[first].wait()
        async with running(new):
            await quick.reached["tx.claim.before"].wait()
            slow.go[first].set()
            await slow.reached[then].wait()
            quick.go["tx.claim.before"].set()
            await until(lambda: transactions(sqlite_url) == [state])
            slow.go[then].set()
            await caller
    assert world.told() == calls
    assert claims(sqlite_url) == [2]
    intact(sqlite_url)


async def test_who_was_overtaken_right_after_its_claim_leaves_the_transaction_alone(
    sqlite_url: str, world: World
) -> None:
    """Another Spine claims it once more before the first claimant has read it: that one alone asks the domain."""
    clocks = late(20), late(10)
    stops = Stops("call.forward.before"), Stops("tx.claim.after"), Stops("call.forward.before")
    old = over(sqlite_url, Remote(world), failpoint=stops[0], clock=clocks[0])
    first = over(sqlite_url, Remote(world), failpoint=stops[1], clock=clocks[1])
    second = over(sqlite_url, Remote(world), failpoint=stops[2])
    async with running(old), flowing(*clocks):
        caller = asyncio.ensure_future(complete(old))
        await stops[0].reached["call.forward.before"].wait()
        async with running(first):
            await stops[1].reached["tx.claim.after"].wait()
            async with running(second):
                await stops[2].reached["call.forward.before"].wait()
                stops[1].go["tx.claim.after"].set()
                await until(lambda: not looks_at(first))
                assert world.told() == []
                stops[2].go["call.forward.before"].set()
                await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
        stops[0].go["call.forward.before"].set()
        assert (await caller).is_complete
    assert [effect.epoch for effect in world.effects("forward", "pay")] == [3, 1]
    assert claims(sqlite_url) == [2, 3]
    intact(sqlite_url)


async def test_a_takeover_that_broke_off_is_begun_again(sqlite_url: str, world: World) -> None:
    """An error of its own ends the task that takes over: the next look finds the transaction as before."""
    slow, clock, failed = Stops("call.forward.before"), late(10), list[str]()

    async def failpoint(moment: str) -> None:
        if moment == "tx.claim.before" and not failed:
            failed.append(moment)
            raise RuntimeError("the task ends")

    old = over(sqlite_url, Remote(world), failpoint=slow, clock=clock)
    new = over(sqlite_url, Remote(world), failpoint=failpoint)
    async with running(old), flowing(clock):
        caller = asyncio.ensure_future(complete(old))
        await slow.reached["call.forward.before"].wait()
        async with running(new):
            await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
        slow.go["call.forward.before"].set()
        await caller
    assert failed
    assert claims(sqlite_url) == [2]


async def test_who_only_undoes_needs_only_the_domains_that_can_be_undone(sqlite_url: str, world: World) -> None:
    """Once the abort is decided a Spine without the LOCAL and POST domains of the completion undoes it all the same."""

    class Book:
        name, after = "book", ("pay",)

        def plan(self, run: RunFacts) -> list[Write]:
            raise Refused("CLOSED", "the books are closed")

    slow, clock = Stops("tx.abort.after"), late(10)
    old = over(sqlite_url, Remote(world), Book(), Sender(world), failpoint=slow, clock=clock)
    new = over(sqlite_url, Remote(world))
    async with running(old), flowing(clock):
        caller = asyncio.ensure_future(failure(old))
        await slow.reached["tx.abort.after"].wait()
        async with running(new):
            await until(lambda: transactions(sqlite_url) == ["ABORTED"])
        slow.go["tx.abort.after"].set()
        assert (await caller).code == "CLOSED"
    assert world.told() == ["forward pay", "rollback pay"]
    assert world.standing() == []
    intact(sqlite_url)


async def test_a_rollback_in_whose_midst_spine_after_spine_ends_is_parked(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted: after so many the domain is not asked again, and an operator is told why."""
    monkeypatch.setattr("actors.saga.STALLED_MOST", 2)
    clocks = late(30), late(20)
    stops = Stops("call.rollback.before"), Stops("call.rollback.before")
    retry = Retry(attempts=2, first_s=0.001, most_s=0.002)
    first, second = (
        over(sqlite_url, Remote(world, forward=refuses()), failpoint=stop, clock=clock, retry=retry)
        for stop, clock in zip(stops, clocks, strict=True)
    )
    third = over(sqlite_url, Remote(world), retry=retry)
    async with running(first), flowing(*clocks):
        caller = asyncio.ensure_future(failure(first))
        await stops[0].reached["call.rollback.before"].wait()
        async with running(second):
            await stops[1].reached["call.rollback.before"].wait()
            async with running(third):
                await until(lambda: transactions(sqlite_url) == ["PARKED"])
                (parked,) = await third._system.reader.parked()  # type: ignore[union-attr]
                assert world.told("rollback") == []
                for stop in stops:
                    stop.go["call.rollback.before"].set()
                assert (await caller).code == "PARKED"
    assert str(parked.error) == (
        "2 processes in a row ended, or lost the transaction, where domain 'pay' was asked to undo it"
    )
    assert claims(sqlite_url) == [2, 3]
    intact(sqlite_url)
