"""A publisher that fails or hangs holds up no completion, and gets its events later, in order."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from spine import Event, Spine
from tests.governed import Published, intact, journal, query, running, until
from tests.integration.desk import Desk, complete

pytestmark = pytest.mark.anyio


class ForRun(Published):
    """Fails for the first event of one run, until told otherwise; it would take those behind it."""

    def __init__(self, run_id: str, *, hang: bool = False) -> None:
        super().__init__()
        self.run_id = run_id
        self.hang = hang
        self.stuck = ""
        self.mended = asyncio.Event()

    async def publish(self, event: Event) -> None:
        if event.run_id == self.run_id and self.stuck in ("", event.event_id) and not self.mended.is_set():
            self.stuck = event.event_id
            if not self.hang:
                raise ConnectionError("the broker is away")
            await self.mended.wait()
        await super().publish(event)


def published(desk: Desk) -> list[tuple[str, str]]:
    assert isinstance(desk.spine._publisher, Published)
    return [(event.run_id, event.tx_id) for event in desk.spine._publisher.events]


@pytest.mark.parametrize("hang", [False, True], ids=["raises", "hangs"])
async def test_a_publisher_that_fails_keeps_nobody_and_gets_its_events_later_in_order(
    sqlite_url: str, hang: bool
) -> None:
    """The completion is committed and returned without it; other runs' events pass; this run's come later, in order."""
    publisher = ForRun("run-1", hang=hang)
    desk = Desk(sqlite_url, publisher)
    async with running(desk.spine):
        with anyio.fail_after(10):
            first = await complete(desk, "run-1", "a")
            other = await complete(desk, "run-2")
            second = await complete(desk, "run-1", "b")
        assert [done.phase for done in (first, other, second)] == ["COMMITTED", "EVENTS_PUBLISHED", "COMMITTED"]
        assert first.is_complete
        assert first.events_published == []
        assert published(desk) == [("run-2", other.transaction_id)]
        assert [event["published"] for event in (await desk.spine.why("run-1")).events] == [False, False]
        publisher.mended.set()
        await until(lambda: len(journal(sqlite_url, "event.published")) == 3)
        assert published(desk)[1:] == [("run-1", first.transaction_id), ("run-1", second.transaction_id)]
        again = await complete(desk, "run-1", "a")
        assert (again.phase, again.events_published) == ("EVENTS_PUBLISHED", ["run.completed"])
    intact(sqlite_url)


async def test_events_that_were_not_delivered_are_delivered_by_the_next_process(sqlite_url: str) -> None:
    """Pending events are in the journal: whoever starts next delivers them, in order, under the same ids."""
    broken = Desk(sqlite_url, ForRun("run-1"))
    async with running(broken.spine):
        for key in ("a", "b"):
            await complete(broken, "run-1", key)
    assert journal(sqlite_url, "event.published") == []
    mended = Desk(sqlite_url)
    async with running(mended.spine):
        await until(lambda: len(published(mended)) == 2)
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    assert isinstance(mended.spine._publisher, Published)
    delivered = [event.event_id for event in mended.spine._publisher.events]
    assert delivered == [body["event_id"] for body in journal(sqlite_url, "event")]
    intact(sqlite_url)


async def test_a_publisher_that_hangs_does_not_hold_the_stop(sqlite_url: str) -> None:
    """Its event stays pending in the journal."""
    desk = Desk(sqlite_url, ForRun("run-1", hang=True))
    async with running(desk.spine):
        await complete(desk, "run-1")
        with anyio.fail_after(5):
            receipts = await desk.spine.stop()
    assert {receipt.end for receipt in receipts} == {"clean"}
    assert query(sqlite_url, "SELECT state FROM outbox") == [("pending",)]


@pytest.mark.parametrize("publisher", [5, object(), "log", Published], ids=["number", "object", "text", "class"])
def test_what_cannot_publish_is_refused_as_publisher(sqlite_url: str, publisher: Any) -> None:
    """Where it is given, not at the first event."""
    with pytest.raises(TypeError, match="publisher"):
        Spine(sqlite_url, publisher=publisher)
