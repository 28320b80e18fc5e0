"""What the caller of a completion is told: what the record says, and of failures everything that is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from spine import Refused, RunFacts, Write
from spine.governance.units import CommitOutcome, Record, StorageFailed
from spine.kernel.clock import VirtualClock
from tests.governed import Published, intact, journal, query, running, until
from tests.participants import Held, Remote, World, complete, failure, over, raises, refuses, steps, transactions

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_what_only_the_end_of_a_process_undid_is_attempted_anew_for_who_waited(
    sqlite_url: str, world: World
) -> None:
    """The domain may be asked once, and the dead process may have asked it: undone, and then done for the caller."""
    reached, let_go = asyncio.Event(), asyncio.Event()

    async def failpoint(moment: str) -> None:
        if moment == "call.forward.before" and not reached.is_set():
            reached.set()
            await let_go.wait()

    # Everybody else sees that its lease was over long ago.
    late = VirtualClock(time.time_ns() // 1000 - 600_000_000)
    dead = over(sqlite_url, Remote(world, attempts=1), failpoint=failpoint, clock=late)
    alive = over(sqlite_url, Remote(world, attempts=1))
    async with running(dead):
        first = asyncio.ensure_future(complete(dead))
        await reached.wait()
        async with running(alive):
            done = await complete(alive)
            assert done.is_complete
        let_go.set()
        while not first.done():
            await late.advance(0.05)
        assert (await first).transaction_id == done.transaction_id
    assert transactions(sqlite_url) == ["ABORTED", "COMMITTED"]
    aborted, committed = journal(sqlite_url, "tx.begun")
    assert (committed["attempt"], committed["previous"]) == (2, aborted["tx_id"])
    assert [body["code"] for body in journal(sqlite_url, "tx.aborted")] == ["INTERRUPTED"]
    assert world.standing() == ["pay"]
    intact(sqlite_url)


async def test_events_are_told_as_published_only_where_that_is_recorded(sqlite_url: str) -> None:
    """The publisher has them, the journal could not be told: the caller hears COMMITTED, and they are said again."""
    publisher = Published()
    spine = over(sqlite_url, publisher=publisher)
    async with running(spine):
        outbox = spine._system.supervisor._children["coordinator"].actor._outbox  # type: ignore[union-attr]
        recorder = outbox._recorder

        class Full:
            async def commit(self, records: Sequence[Record], **more: Any) -> CommitOutcome:
                if records[0].kind == "event.published":
                    return StorageFailed("disk full")
                return await recorder.commit(records, **more)  # type: ignore[no-any-return]

        outbox._recorder = Full()
        done = await complete(spine)
        assert (done.phase, done.events_published) == ("COMMITTED", [])
        assert len(publisher.events) == 1
        assert (await complete(spine)).phase == "COMMITTED"
        outbox._recorder = recorder
    again = over(sqlite_url, publisher=publisher)
    async with running(again):
        await until(lambda: query(sqlite_url, "SELECT state FROM outbox") == [("published",)])
        assert (await complete(again)).phase == "EVENTS_PUBLISHED"
    assert len({event.event_id for event in publisher.events}) == 1
    intact(sqlite_url)


async def test_the_error_of_a_parked_completion_has_the_cause_of_the_abort(sqlite_url: str, world: World) -> None:
    """Why it was to be undone, which is not why it could not be."""
    stuck = Remote(world, rollback=raises(OSError("the bank is closed")))
    spine = over(sqlite_url, stuck, Remote(world, "no", after=["pay"], forward=refuses("NO_STOCK", "sold out")))
    async with running(spine):
        error = await failure(spine)
    assert (error.code, error.failed_domain) == ("PARKED", "no")
    assert isinstance(error.cause, Refused)
    assert error.__cause__ is error.cause
    assert "sold out" in str(error.cause)
    assert {result.domain: result.code for result in error.domains if result.code} == {
        "pay": "OSError",
        "no": "NO_STOCK",
    }


async def test_how_long_a_completion_took_and_what_it_published_are_told(sqlite_url: str, world: World) -> None:
    """The time that its domains took is in the result; health counts the events that are out."""
    clock, held = VirtualClock(time.time_ns() // 1000), Held()
    spine = over(sqlite_url, Remote(world, forward=held), clock=clock)
    async with running(spine):
        call = asyncio.ensure_future(complete(spine))
        await held.reached.wait()
        await clock.advance(2)
        held.let_go.set()
        done = await call
        assert (done.phase, done.duration_ms) == ("EVENTS_PUBLISHED", 2000)
        assert spine.health().transactions["events_published"] == 1


class Book:
    """A LOCAL domain between two outside."""

    name, after = "book", ("pay",)

    def plan(self, run: RunFacts) -> list[Write]:
        return []


async def test_what_stands_by_way_of_a_local_domain_on_what_could_not_be_undone_is_kept_too(
    sqlite_url: str, world: World
) -> None:
    """The parcel comes after the booking and that after the payment: while the parcel stands the payment does."""
    parcel = Remote(world, "parcel", after=["book"], rollback=raises(OSError("on its way")))
    no = Remote(world, "no", after=["parcel"], forward=refuses())
    spine = over(sqlite_url, Remote(world), Book(), parcel, no)
    async with running(spine):
        error = await failure(spine)
        assert error.phase == "PARKED"
        assert steps(sqlite_url) == {"pay": "DONE", "parcel": "PARKED", "no": "ROLLED_BACK"}
    assert world.standing() == ["parcel", "pay"]
    intact(sqlite_url)


async def test_an_abort_of_local_domains_alone_is_counted_too(sqlite_url: str) -> None:
    class Full:
        name, after = "full", ()

        def plan(self, run: RunFacts) -> list[Write]:
            raise Refused("FULL", "no room")

    spine = over(sqlite_url, Full())
    async with running(spine):
        assert (await failure(spine)).code == "FULL"
        assert spine.health().transactions["aborted"] == 1
        assert spine.health().transactions["committed"] == 0
