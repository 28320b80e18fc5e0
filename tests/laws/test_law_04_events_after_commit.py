"""Law 4: events after commit, at least once, in order per run; never for an aborted transaction.

Wherever the process is killed, and whoever delivers them then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spine import Event, Spine
from spine.journal.reader import JournalReader
from tests.crash.invariants import check
from tests.crash.life import Blow
from tests.crash.lives import KILLED, Lives
from tests.crash.outside import LEDGER, Services, domains, kind_of
from tests.crash.outside import World as Outside
from tests.governed import Published, journal, query, running, until
from tests.participants import Remote, Sender, World, acks, complete, failure, over, raises, refuses

pytestmark = pytest.mark.anyio


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    found = Lives()
    yield found
    found.close()


def prepared(lives: Lives, url: str, folder: Path) -> None:
    assert lives.live(url, folder) == 0
    query(url, LEDGER)


def types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


# -- after the commit


async def test_what_is_published_and_posted_is_committed_already(database_url: str, world: World) -> None:
    """The publisher and the domain look into the database themselves, with connections of their own."""
    early: list[str] = []

    def look(what: str, tx_id: str) -> None:
        if query(database_url, "SELECT state FROM transactions WHERE tx_id = ?", tx_id) != [("COMMITTED",)]:
            early.append(f"{what} {tx_id}")

    class Watching(Published):
        async def publish(self, event: Event) -> None:
            look(event.type, event.tx_id)
            await super().publish(event)

    async def post(do: Any) -> None:
        look("post", world.effects("post", "mail")[-1].tx_id)
        do()

    publisher = Watching()
    outside, local = (
        over(database_url, Remote(world), Sender(world, post=post), publisher=publisher),
        over(database_url, publisher=publisher),
    )
    async with running(outside, local):
        for n in range(5):
            await complete(outside, f"outside-{n}")
            await complete(local, f"local-{n}")
        await until(lambda: len(acks(database_url, "mail")) == 5)
    assert len(publisher.events) == 10
    assert early == []


async def test_an_aborted_or_parked_completion_publishes_and_posts_nothing(database_url: str, world: World) -> None:
    """Refused by a domain outside, by the user's own, by the commit itself; compensated, or stuck half way."""
    publisher = Published()
    stuck = Remote(world, "stock", rollback=raises(ConnectionError("away")))
    refusing = over(database_url, Remote(world, forward=refuses()), Sender(world), publisher=publisher)
    parking = over(
        database_url, stuck, Remote(world, after=("stock",), forward=refuses()), Sender(world), publisher=publisher
    )
    async with running(refusing, parking):
        assert (await failure(refusing, "run-1")).phase == "ROLLED_BACK"
        assert (await failure(parking, "run-2")).phase == "PARKED"
        # The outbox has had its turn once a later completion is through.
        fine = over(database_url, publisher=publisher)
        async with running(fine):
            await complete(fine, "run-3")
    assert [event.run_id for event in publisher.events] == ["run-3"]
    assert world.told("post") == []
    assert query(database_url, "SELECT DISTINCT run_id FROM outbox") == [("run-3",)]


# -- at least once, killed anywhere


@pytest.mark.parametrize(
    ("moment", "deliveries"),
    [
        # Between the commit and the publication: nobody heard of it yet.
        ("tx.commit.after", {1}),
        ("event.publish.before", {1}),
        # Between the publication and its record: it is said again, under the same id.
        ("event.publish.after", {2}),
        ("event.published.before", {2}),
        ("event.published.after", {1}),
    ],
)
async def test_killed_on_the_way_the_event_is_published_by_the_next_process(
    lives: Lives, sqlite_url: str, tmp_path: Path, moment: str, deliveries: set[int]
) -> None:
    """kill -9 between the commit and the publication, or between that and its record; then a restart."""
    prepared(lives, sqlite_url, tmp_path)
    killed = await asyncio.to_thread(
        lives.live, sqlite_url, tmp_path, runs=["commit-1", "refuse-1"], blow=Blow("kill", moment)
    )
    assert killed == KILLED
    assert await asyncio.to_thread(lives.live, sqlite_url, tmp_path) == 0
    (event,) = [row for row in journal(sqlite_url, "event") if row["type"] == "run.completed"]
    delivered = [line["event"] for line in Services(tmp_path / "services").of("delivered")]
    assert delivered.count(event["event_id"]) in deliveries
    assert kind_of(event["run_id"]) == "commit"
    check(sqlite_url, tmp_path)


# -- in order per run


async def test_the_events_of_a_run_are_published_in_the_order_of_their_commits(database_url: str, world: World) -> None:
    """Many completions of a few runs at once, while the publisher fails now and then."""

    class Failing(Published):
        async def publish(self, event: Event) -> None:
            self.failures = int(self.tries % 3 == 1)
            await super().publish(event)

    publisher = Failing()
    spine = over(database_url, Remote(world), Sender(world), publisher=publisher)
    async with running(spine):
        async with asyncio.TaskGroup() as group:
            for n in range(24):
                group.create_task(complete(spine, f"run-{n % 3}", completion_key=f"key-{n}"))
        await until(lambda: query(database_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    committed = [row["event_id"] for row in journal(database_url, "event") if row["type"] == "run.completed"]
    assert len(committed) == 24
    for run in range(3):
        ours = [event.event_id for event in publisher.events if event.run_id == f"run-{run}"]
        assert list(dict.fromkeys(ours)) == [event for event in committed if event in ours]
        assert len(ours) >= 8


async def test_what_a_dead_process_left_unpublished_comes_before_what_the_next_one_commits(
    lives: Lives, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process completes the run under another key at once, while it is slow to learn what is pending."""
    prepared(lives, sqlite_url, tmp_path)
    blow = Blow("kill", "tx.commit.after")
    assert await asyncio.to_thread(lives.live, sqlite_url, tmp_path, runs=["twice-1"], blow=blow) == KILLED
    look = JournalReader.pending_events

    async def slowly(self: JournalReader, *args: Any) -> Any:
        found = await look(self, *args)
        await asyncio.sleep(0.7)
        return found

    monkeypatch.setattr(JournalReader, "pending_events", slowly)
    publisher = Published()
    spine = Spine(sqlite_url, domains=domains(Outside(Services(tmp_path / "services"))), publisher=publisher)
    async with running(spine):
        second = await complete(spine, "twice-1", completion_key="second")
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    assert [event.tx_id for event in publisher.events][-1] == second.transaction_id
    assert [event.event_id for event in publisher.events] == [
        row["event_id"] for row in journal(sqlite_url, "event") if row["type"] == "run.completed"
    ]


async def test_a_delivery_that_broke_off_comes_before_what_is_committed_later(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that delivers is ended by an error of its own; the run's next events wait for what it left."""
    monkeypatch.setattr("actors.outbox.RELOAD_S", 1.0)
    failed: list[str] = []

    async def failpoint(name: str) -> None:
        if name == "event.publish.before" and not failed:
            failed.append(name)
            raise RuntimeError("the task ends")

    publisher = Published()
    spine = over(sqlite_url, Remote(world), publisher=publisher, failpoint=failpoint)
    async with running(spine):
        done = [(await complete(spine, completion_key=key)).transaction_id for key in ("first", "second", "third")]
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    assert failed
    assert [event.tx_id for event in publisher.events] == done


async def test_what_found_no_room_comes_before_what_is_committed_later(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outbox is full for a moment; when it has room again, what it left out keeps its place."""
    monkeypatch.setattr("actors.outbox.QUEUED_MOST", 1)
    monkeypatch.setattr("actors.outbox.RELOAD_S", 1.0)
    release = asyncio.Event()

    class Holding(Published):
        async def publish(self, event: Event) -> None:
            if event.run_id == "other":
                await release.wait()
            await super().publish(event)

    publisher = Holding()
    spine = over(sqlite_url, publisher=publisher)
    async with running(spine):
        holding = asyncio.ensure_future(complete(spine, "other"))
        await until(lambda: journal(sqlite_url, "event"))
        left_out = await complete(spine, completion_key="first")
        assert left_out.phase == "COMMITTED"
        release.set()
        await holding
        later = await complete(spine, completion_key="second")
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    told = [event.tx_id for event in publisher.events if event.run_id == "run-1"]
    assert told == [left_out.transaction_id, later.transaction_id]


async def test_what_another_living_spine_has_yet_to_publish_comes_first(
    database_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Spines complete one run under two keys; the one whose commit was first is slow to publish it."""
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.05)
    release, told = asyncio.Event(), Published()

    class Slow(Published):
        async def publish(self, event: Event) -> None:
            await release.wait()
            await told.publish(event)

    slow, quick = over(database_url, publisher=Slow()), over(database_url, publisher=told)
    async with running(slow, quick):
        first = await complete(slow, completion_key="first")
        second = await complete(quick, completion_key="second")
        assert [first.phase, second.phase] == ["COMMITTED", "COMMITTED"]
        assert told.events == []
        release.set()
        # Recorded, not only told: a Spine that stops in between leaves its event to the other, which tells it again.
        await until(lambda: len(told.events) == 2 and len(journal(database_url, "event.published")) == 2)
    assert [event.tx_id for event in told.events] == [first.transaction_id, second.transaction_id]
