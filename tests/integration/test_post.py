"""Domains that cannot be undone act after the commit, from the outbox: at least once, in order, until they succeed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import anyio
import pytest

from spine import Spine
from spine.domains import effect_id
from tests.governed import Published, intact, journal, query, running, until
from tests.participants import (
    Remote,
    Sender,
    World,
    acks,
    complete,
    coordinator,
    failure,
    hang,
    loses,
    over,
    raises,
    refuses,
    then,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_what_cannot_be_undone_acts_after_the_commit_and_in_order(database_url: str, world: World) -> None:
    """Each POST domain is called once the commit can be read, after the run's event, in the order of the plan."""
    seen: list[tuple[str, list[str]]] = []
    publisher = Published()

    class Watching(Sender):
        async def post(self, effect: Any) -> None:
            seen.append((self.name, transactions(database_url)))
            assert [event.type for event in publisher.events] == ["run.completed"]
            await super().post(effect)

    mail, bell = Watching(world, "mail", after=["pay"], action="send_mail"), Watching(world, "bell", after=["mail"])
    spine = over(database_url, bell, mail, Remote(world), publisher=publisher)
    async with running(spine):
        done = await complete(spine)
        await until(lambda: len(seen) == 2)
        await until(lambda: len(acks(database_url, "mail", "bell")) == 2)
        why = await spine.why("run-1")
    assert seen == [("mail", ["COMMITTED"]), ("bell", ["COMMITTED"])]
    assert done.transaction_id is not None
    (effect,) = world.effects("post", "mail")
    assert (effect.id, effect.tx_id, effect.attempt) == (effect_id(done.transaction_id, "mail"), done.transaction_id, 1)
    assert [result.domain for result in done.domains] == ["incidents", "policies", "traces", "pay"]
    assert done.events_published == ["run.completed"]
    assert acks(database_url, "mail", "bell") == [("mail", "SUCCESS"), ("bell", "SUCCESS")]
    assert [body["action"] for body in journal(database_url, "ack") if body["domain"] == "mail"] == ["send_mail"]
    assert (why.verdict, why.contract["overall"] if why.contract else None) == ("succeeded", "COMPLETE")
    assert [event["published"] for event in why.events] == [True] * 3
    intact(database_url)


async def test_nothing_acts_after_a_commit_that_never_came(sqlite_url: str, world: World) -> None:
    """An aborted completion posts nothing, nor does one that is parked."""
    spine = over(sqlite_url, Remote(world, forward=refuses(), rollback=raises(OSError())), Sender(world, after=["pay"]))
    async with running(spine):
        await failure(spine)
    later = over(sqlite_url, Sender(world))
    async with running(later):
        assert (await complete(later, "run-2")).is_complete
        await until(lambda: world.effects("post", "mail"))
    assert {effect.run_id for effect in world.effects("post", "mail")} == {"run-2"}
    assert {body["run_id"] for body in journal(sqlite_url, "event")} == {"run-2"}


async def test_a_post_is_tried_until_it_succeeds_under_the_same_id(sqlite_url: str, world: World) -> None:
    """Errors, a refusal and a lost reply alike; neither the completion's caller nor another run waits for it."""
    behaviour = then(raises(ConnectionError("away")), refuses(), loses(raises(OSError("lost"))), well)

    async def post(do: Any) -> Any:
        return await (behaviour if world.calls[-1].effect.run_id == "run-1" else well)(do)

    spine = over(sqlite_url, Sender(world, post=post))
    async with running(spine):
        done = await complete(spine)
        assert done.is_complete
        assert (await complete(spine, "run-2")).is_complete
        await until(lambda: acks(sqlite_url, "mail").count(("mail", "SUCCESS")) == 2)
        assert spine.health().transactions["events_failed"] == 3
    tried = [effect for effect in world.effects("post", "mail") if effect.run_id == "run-1"]
    assert [effect.attempt for effect in tried] == [1, 2, 3, 4]
    assert len({effect.id for effect in tried}) == 1
    published = [body for body in journal(sqlite_url, "event.published") if body["event_ids"] == [tried[0].id]]
    assert [body["attempts"] for body in published] == [4]
    intact(sqlite_url)


async def test_a_post_that_does_not_answer_is_cut_off_and_tried_again(sqlite_url: str, world: World) -> None:
    """Its deadline is the domain's own ``timeout_s``."""
    spine = over(sqlite_url, Sender(world, post=then(hang, well), timeout_s=0.05))
    async with running(spine):
        await complete(spine)
        await until(lambda: acks(sqlite_url, "mail"))
    first, second = world.effects("post", "mail")
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.deadline - first.deadline >= 0.05


async def test_a_post_that_will_not_be_cancelled_holds_up_nothing_else(sqlite_url: str, world: World) -> None:
    """It is left behind like any other domain's call; its run's next try and other runs go on."""
    let_go = asyncio.Event()

    async def stuck(do: Any) -> Any:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()

    spine = over(sqlite_url, Sender(world, post=then(stuck, well), timeout_s=0.05))
    async with running(spine):
        await complete(spine)
        try:
            await until(lambda: acks(sqlite_url, "mail"), within_s=5)
        finally:
            let_go.set()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("named", [True, False], ids=["publisher", "default publisher"])
async def test_a_post_that_is_pending_survives_a_restart(sqlite_url: str, world: World, named: bool) -> None:
    """Failing until the stop, it is delivered by the next Spine that declares the domain, under the same id."""
    publisher = Published(failures=1_000)

    def spine_with(post: Any) -> Spine:
        if named:
            return over(sqlite_url, Sender(world, post=post), publisher=publisher, drain_s=0.05)
        return Spine(sqlite_url, domains=[Sender(world, post=post)])

    first = spine_with(raises(ConnectionError("away")))
    async with running(first):
        if not named:
            # As when the process dies between its commit and its first publication.
            coordinator(first)._outbox.deliver = lambda *_, **__: asyncio.Future()
        with anyio.move_on_after(0.5 if not named else 10):
            assert (await complete(first)).phase == "COMMITTED"
    assert acks(sqlite_url, "mail") == []
    publisher.failures = 0
    other = over(sqlite_url)
    async with running(other):
        # One that does not know the domain leaves it alone.
        assert (await complete(other, "run-2")).is_complete
    assert acks(sqlite_url, "mail") == []
    second = spine_with(well)
    async with running(second):
        await until(lambda: acks(sqlite_url, "mail") == [("mail", "SUCCESS")])
    assert len({effect.id for effect in world.effects("post", "mail")}) == 1
    assert query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)]
    intact(sqlite_url)


async def test_a_post_that_is_stuck_is_counted(sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health tells of it after some tries, and no more once it is through."""
    monkeypatch.setattr("actors.outbox.backoff", lambda *_, **__: 0.001)
    away = raises(ConnectionError("away"))
    spine = over(sqlite_url, Sender(world, post=away))
    async with running(spine):
        await complete(spine)
        await until(lambda: spine.health().transactions["events_stuck"] == 1)
        spine._participants[-1].domain.posts = well  # type: ignore[union-attr]
        await until(lambda: spine.health().transactions["events_stuck"] == 0)
    assert acks(sqlite_url, "mail") == [("mail", "SUCCESS")]
