"""What went wrong with other people's outboxes and must not here; each test names the public issue it comes from."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from spine import Event
from tests.governed import Published, intact, journal, query, running, together, until
from tests.participants import Sender, World, complete, coordinator, over

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


def pending(url: str) -> int:
    return int(query(url, "SELECT count(*) FROM outbox WHERE state = 'pending'")[0][0])


@pytest.mark.usefixtures("brief")
async def test_no_row_of_the_outbox_is_stranded(sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """MassTransit#5339: rows stayed in the outbox for ever, because nothing looked for them again.

    Here what did not fit in memory, what failed many times and what a dead process left is found and delivered.
    """
    monkeypatch.setattr("actors.outbox.QUEUED_MOST", 3)
    monkeypatch.setattr("actors.outbox.LINES_MOST", 2)
    monkeypatch.setattr("actors.outbox.backoff", lambda *_, **__: 0.001)
    publisher = Published(failures=12)
    spine = over(sqlite_url, Sender(world), publisher=publisher)
    async with running(spine):
        await together(*[partial(complete, spine, f"run-{n}") for n in range(20)])
        await until(lambda: pending(sqlite_url) == 0)
    assert {event.run_id for event in publisher.events} == {f"run-{n}" for n in range(20)}
    assert {effect.run_id for effect in world.effects("post", "mail")} == {f"run-{n}" for n in range(20)}

    publisher.failures = 1_000_000
    dying = over(sqlite_url, Sender(world), publisher=publisher, drain_s=0.01)
    async with running(dying):
        await complete(dying, "last")
    assert pending(sqlite_url) == 2
    publisher.failures = 0
    heir = over(sqlite_url, Sender(world), publisher=publisher)
    async with running(heir):
        await until(lambda: pending(sqlite_url) == 0)
    assert publisher.events[-1].run_id == "last"
    assert world.effects("post", "mail")[-1].run_id == "last"
    intact(sqlite_url)


async def in_order(publisher: Published, url: str) -> None:
    """What was published of each run, first deliveries only, is in the order of the journal, and nothing twice."""
    committed = [body["event_id"] for body in journal(url, "event")]
    for run_id in {event.run_id for event in publisher.events}:
        told = [event.event_id for event in publisher.events if event.run_id == run_id]
        assert len(told) == len(set(told)), "published twice"
        assert told == sorted(told, key=committed.index), "published in the wrong order"


async def test_events_of_one_run_are_published_once_and_in_order(sqlite_url: str) -> None:
    """MassTransit#3791 and #3512: two instances published the same message, and messages overtook each other.

    Here the Spine that committed an event delivers it while it lives, and a failing one holds up what comes after it.
    """

    class Slow(Published):
        async def publish(self, event: Event) -> None:
            await asyncio.sleep(0.001 if event.n else 0.003)
            await super().publish(event)

    publisher = Slow(failures=3)
    spines = [over(sqlite_url, publisher=publisher) for _ in range(2)]
    async with running(*spines):
        for key in range(6):
            await together(
                *[partial(complete, spines[run % 2], f"run-{run}", completion_key=str(key)) for run in range(6)]
            )
        await until(lambda: pending(sqlite_url) == 0)
    assert len(publisher.events) == 36
    await in_order(publisher, sqlite_url)
    intact(sqlite_url)


@pytest.mark.usefixtures("brief")
async def test_an_event_does_not_overtake_one_that_a_dead_process_left(sqlite_url: str) -> None:
    """MassTransit#3512 again: after a restart, new messages went out before those that were still waiting.

    Here a run's event waits for what its predecessor left of the same run.
    """
    publisher = Published(failures=1_000_000)
    dying = over(sqlite_url, publisher=publisher, drain_s=0.01)
    async with running(dying):
        await complete(dying, completion_key="one")
    assert pending(sqlite_url) == 1
    publisher.failures = 0
    heir = over(sqlite_url, publisher=publisher)
    async with running(heir):
        await complete(heir, completion_key="two")
        await until(lambda: pending(sqlite_url) == 0)
    assert len(publisher.events) == 2
    await in_order(publisher, sqlite_url)


async def test_an_event_does_not_overtake_one_that_another_living_process_holds(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same between two that live: the run's earlier event is still being tried elsewhere when another commits."""
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.05)
    publisher = Published()

    class Away(Published):
        back = False

        async def publish(self, event: Event) -> None:
            if not self.back:
                raise ConnectionError("away")
            await publisher.publish(event)

    away = Away()
    here, there = over(sqlite_url, publisher=away), over(sqlite_url, publisher=publisher)
    async with running(here, there):
        await complete(here, completion_key="one")
        await complete(there, completion_key="two")
        away.back = True
        await until(lambda: pending(sqlite_url) == 0)
    assert len(publisher.events) == 2
    await in_order(publisher, sqlite_url)


async def test_an_event_does_not_overtake_one_that_did_not_fit(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where memory is short: a run whose earlier event found no room does not have a later one sent first."""
    monkeypatch.setattr("actors.outbox.LINES_MOST", 1)
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.05)
    held = asyncio.Event()

    class Busy(Published):
        async def publish(self, event: Event) -> None:
            if event.run_id == "busy":
                await held.wait()
            await super().publish(event)

    publisher = Busy()
    spine = over(sqlite_url, publisher=publisher)
    async with running(spine):
        busy = asyncio.ensure_future(complete(spine, "busy"))
        await until(lambda: len(coordinator(spine)._outbox))
        await complete(spine, completion_key="one")
        held.set()
        await busy
        await complete(spine, completion_key="two")
        await until(lambda: pending(sqlite_url) == 0)
    assert len(publisher.events) == 3
    await in_order(publisher, sqlite_url)
