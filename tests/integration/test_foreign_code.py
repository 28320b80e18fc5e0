"""Whatever the code of domains and publishers does, a completion ends as one, on the record, and nobody else waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from actors.saga import STALLED_MOST
from spine import Effect, Event, Refused, RunFacts, Spine, Write
from spine.kernel.errors import ConfigurationError
from tests.governed import Published, intact, journal, query, running, until
from tests.participants import (
    Local,
    Remote,
    Sender,
    World,
    complete,
    failure,
    moves,
    over,
    raises,
    refuses,
    returns,
    steps,
    then,
    transactions,
    well,
)
from tests.stubborn import swallow_cancellation

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


class Wordless(Refused):
    """A refusal whose author forgot what a refusal says."""

    def __init__(self) -> None:
        Exception.__init__(self, "because")


class Speechless(Refused):
    """A refusal that cannot say why."""

    def __init__(self, error: BaseException) -> None:
        Exception.__init__(self, "because")
        self._error = error

    def __getattribute__(self, name: str) -> Any:
        if name in ("code", "reason"):
            raise super().__getattribute__("_error")
        return super().__getattribute__(name)


class Thorny(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, name: str) -> Any:
        raise RuntimeError("thorns")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("thorns")

    def __len__(self) -> int:
        return 1


async def test_a_refusal_without_code_and_reason_is_a_refusal(sqlite_url: str, world: World) -> None:
    """Out of forward, plan and rollback alike: undone or parked, and recorded with what there is to say."""

    def no(run: RunFacts) -> Any:
        raise Wordless

    for n, domains in enumerate(
        [
            [Remote(world, forward=raises(Wordless()))],
            [Remote(world), Local(no, "planner", after=["pay"])],
            [Remote(world, rollback=raises(Wordless())), Remote(world, "no", after=["pay"], forward=refuses())],
        ]
    ):
        spine = over(sqlite_url, *domains)
        async with running(spine):
            error = await failure(spine, f"run-{n}")
            assert error.code in ("REFUSED", "PARKED")
            why = await spine.why(f"run-{n}")
            assert why.cause.code == "REFUSED"
            assert "because" in why.cause.text
    assert [transactions(sqlite_url, f"run-{n}") for n in range(3)] == [["ABORTED"], ["ABORTED"], ["PARKED"]]
    intact(sqlite_url)


@pytest.mark.parametrize("error", [KeyError("why"), SystemExit(3)], ids=["error", "exit"])
async def test_a_refusal_that_cannot_say_why_is_a_refusal(sqlite_url: str, world: World, error: BaseException) -> None:
    """Out of forward, plan and rollback alike: asked once, undone or parked, and neither crash nor exit."""

    def no(run: RunFacts) -> Any:
        raise Speechless(error)

    for n, domains in enumerate(
        [
            [Remote(world, forward=raises(Speechless(error)))],
            [Local(no, "planner")],
            [Remote(world), Local(no, "planner", after=["pay"])],
            [Remote(world, rollback=raises(Speechless(error))), Remote(world, "no", after=["pay"], forward=refuses())],
        ]
    ):
        spine = over(sqlite_url, *domains)
        async with running(spine):
            assert (await failure(spine, f"run-{n}")).code in ("REFUSED", "PARKED")
            assert (await spine.why(f"run-{n}")).cause.code == "REFUSED"
    assert world.told()[:2] == ["forward pay", "rollback pay"]
    assert not journal(sqlite_url, "tx.claimed")
    ended = [transactions(sqlite_url, f"run-{n}") for n in range(4)]
    assert ended == [["ABORTED"], ["ABORTED"], ["ABORTED"], ["PARKED"]]
    intact(sqlite_url)


async def test_a_result_that_cannot_be_read_is_undone(sqlite_url: str, world: World) -> None:
    """It happened, and nobody could be told of it again: one call, one rollback."""
    spine = over(sqlite_url, Remote(world, forward=returns(Thorny())))
    async with running(spine):
        assert (await failure(spine)).code == "RuntimeError"
    assert world.told() == ["forward pay", "rollback pay"]
    assert transactions(sqlite_url) == ["ABORTED"]


async def test_what_a_domain_changes_in_what_it_is_given_reaches_nobody(sqlite_url: str, world: World) -> None:
    """Results in a plan, the descriptor of a post, the payload of an event: record and next try have their own."""

    def meddle(run: RunFacts) -> list[Write]:
        run.results["pay"]["id"] = "EVIL"  # type: ignore[index]
        return []

    descriptors: list[dict[str, Any]] = []

    class Meddling(Sender):
        async def post(self, effect: Effect) -> None:
            descriptors.append(dict(effect.descriptor))
            effect.descriptor.clear()  # type: ignore[attr-defined]
            await super().post(effect)

    class Greedy(Published):
        async def publish(self, event: Event) -> None:
            payload = dict(event.payload)
            event.payload.clear()  # type: ignore[attr-defined]
            self.tries += 1
            if self.tries == 1:
                raise ConnectionError("away")
            self.events.append(event)
            assert payload["run_status"] == "succeeded"

    publisher = Greedy()
    mail = Meddling(world, post=then(raises(OSError()), well))
    pay, planner = Remote(world, forward=returns({"id": "p-1"})), Local(meddle, "planner", after=["pay"])
    spine = over(sqlite_url, pay, planner, mail, publisher=publisher)
    async with running(spine):
        done = await complete(spine)
        await until(lambda: len(descriptors) == 2 and publisher.events)
    assert {domain.domain: domain.result_id for domain in done.domains}["pay"] == "p-1"
    assert descriptors[0] == descriptors[1] != {}


async def test_a_publisher_that_will_not_be_stopped_is_left_behind_and_told_as_stuck(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It swallows its cancellation for one run; the other runs' events and posts go on, and health tells of the one."""
    monkeypatch.setattr("actors.outbox.PUBLISH_S", 0.05)
    monkeypatch.setattr("actors.outbox.STUCK_S", 0.2)
    monkeypatch.setattr("actors.outbox.DELIVERIES", 1)
    monkeypatch.setattr("actors.effect_calls.CANCEL_GRACE_S", 0.05)
    let_go = asyncio.Event()

    class Stubborn(Published):
        async def publish(self, event: Event) -> None:
            if event.run_id != "stuck":
                return await super().publish(event)
            while not let_go.is_set():
                with suppress(asyncio.CancelledError):
                    await let_go.wait()
            raise ConnectionError("still away")

    publisher = Stubborn()
    spine = over(sqlite_url, Sender(world), publisher=publisher)
    async with running(spine):
        try:
            await complete(spine, "stuck")
            await complete(spine, "run-2")
            await until(lambda: [event.run_id for event in publisher.events] == ["run-2"])
            await until(lambda: [call.effect.run_id for call in world.calls] == ["run-2"])
            await until(lambda: spine.health().transactions["events_stuck"] >= 1)
        finally:
            let_go.set()


async def test_a_post_that_hangs_delays_neither_publisher_nor_other_posts(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each POST domain has its own bound of calls at a time, and so has the publisher."""
    monkeypatch.setattr("actors.outbox.DELIVERIES", 1)
    hanging = asyncio.Event()

    async def hang(do: Any) -> Any:
        await hanging.wait()

    publisher = Published()
    spine = over(sqlite_url, Sender(world, "slow", post=hang), Sender(world, "quick"), publisher=publisher)
    async with running(spine):
        await complete(spine, "run-1")
        await complete(spine, "run-2")
        await until(lambda: len(publisher.events) == 2)
        hanging.set()
        await until(lambda: world.told().count("post quick") == 2)


async def test_whose_calls_hang_keeps_nobody_elses_from_being_made(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that will not end are bounded for each domain and method, and for the publisher, on their own."""
    monkeypatch.setattr("actors.effect_calls.CALLS_MOST", 2)
    monkeypatch.setattr("actors.effect_calls.CANCEL_GRACE_S", 0.01)
    monkeypatch.setattr("actors.outbox.PUBLISH_S", 0.01)
    monkeypatch.setattr("actors.attempts.FIRST_DELIVERY_S", 0.01)
    let_go = asyncio.Event()
    held: list[str] = []

    class Stubborn:
        async def publish(self, event: Event) -> None:
            held.append(event.run_id)
            await swallow_cancellation(let_go)

    ship = Remote(world, "ship", after=["pay"], forward=then(well, well, well, refuses()))
    spine = over(sqlite_url, Remote(world), ship, publisher=Stubborn())
    async with running(spine):
        try:
            for n in range(3):
                assert (await complete(spine, f"run-{n}")).is_complete
            await until(lambda: len(held) == 2)
            error = await failure(spine, "run-3")
        finally:
            let_go.set()
    assert (error.code, error.phase) == ("NO_FUNDS", "ROLLED_BACK")
    assert world.told()[-4:] == ["forward pay", "forward ship", "rollback ship", "rollback pay"]


@pytest.mark.parametrize("publisher", [None, Published()], ids=["default publisher", "publisher"])
async def test_a_spine_reloads_its_own_events_whatever_it_declares(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, publisher: Any
) -> None:
    """A delivery that broke off is taken up again while its process lives."""
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.02)
    broken: list[str] = []

    async def break_once(name: str) -> None:
        if name == "event.published.before" and not broken:
            broken.append(name)
            raise RuntimeError("broken off")

    spine = over(sqlite_url, publisher=publisher, failpoint=break_once)
    async with running(spine):
        await complete(spine)
        await until(lambda: journal(sqlite_url, "event.published"))
    assert broken
    intact(sqlite_url)


async def test_a_rollback_in_whose_middle_its_driver_ends_again_and_again_is_parked(
    sqlite_url: str, world: World
) -> None:
    """Each end counts as a try: it is visible to an operator instead of being driven for ever."""

    async def end_there(name: str) -> None:
        if name == "call.rollback.before":
            raise RuntimeError("the driver ends here")

    spine = over(sqlite_url, Remote(world, forward=refuses()), failpoint=end_there)
    async with running(spine):
        with suppress(Exception):
            await complete(spine)
        await until(lambda: transactions(sqlite_url) == ["PARKED"])
        why = await spine.why("run-1")
    assert (why.verdict, why.cause.code) == ("parked", "STALLED")
    assert steps(sqlite_url) == {"pay": "PARKED"}
    assert moves(sqlite_url).count("undo pay") == 1
    assert query(sqlite_url, "SELECT epoch FROM transactions")[0][0] <= STALLED_MOST + 1
    intact(sqlite_url)


@pytest.mark.parametrize(
    ("name", "action", "told"),
    [
        ("\ud800", "do", "name"),
        ("a\x00b", "do", "name"),
        ("pay", "\ud800", "action"),
        ("pay", "a\x00b", "action"),
        ("orchestrator", "finalize_run", "Spine's own"),
        ("contract", "reconcile", "Spine's own"),
    ],
)
def test_a_domain_whose_name_or_action_cannot_be_recorded_is_refused_when_it_is_declared(
    world: World, name: str, action: str, told: str
) -> None:
    domain = Remote(world, name)
    domain.action = action
    with pytest.raises(ConfigurationError, match=told):
        Spine(domains=[domain])
