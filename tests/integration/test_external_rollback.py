"""What was done outside is undone in reverse order, each step recorded before the next one."""

from __future__ import annotations

from typing import Any

import pytest

from spine import Refused, Write
from spine.domains import effect_id
from tests.governed import intact, journal, query, running, until
from tests.participants import (
    Local,
    Remote,
    World,
    complete,
    failure,
    moves,
    over,
    raises,
    refuses,
    steps,
    then,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_a_local_domain_that_fails_undoes_what_was_done_outside(database_url: str, world: World) -> None:
    """A refusal in ``plan``, an error, and a write that changes no row: each rolls the payment back."""
    book = Local(Refused("CLOSED", "the books are closed"), after=["pay"])
    spine = over(database_url, Remote(world), book)
    async with running(spine):
        query(database_url, "CREATE TABLE books (run_id TEXT PRIMARY KEY, cents INTEGER NOT NULL)")
        for does, code in (
            (Refused("CLOSED", "the books are closed"), "CLOSED"),
            (KeyError("account"), "KeyError"),
            ([Write("UPDATE books SET cents = 1 WHERE run_id = 'none'")], "WRITE_GUARD"),
            ([Write("INSERT INTO nowhere VALUES (1)")], "WRITE_GUARD"),
            ([Write("UPDATE runs SET tenant_id = 'x'", rows=None)], "WRITE_GUARD"),
        ):
            book.does = does
            error = await failure(spine)
            assert (error.failed_domain, error.code) == ("book", code)
            assert world.standing() == []
            assert moves(database_url)[-4:] == ["aborting", "undo pay", "undone pay", "aborted"]
        book.does = []
        done = await complete(spine)
    assert world.told() == ["forward pay", "rollback pay"] * 5 + ["forward pay"]
    assert transactions(database_url) == ["ABORTED"] * 5 + ["COMMITTED"]
    begun = journal(database_url, "tx.begun")
    assert [body["attempt"] for body in begun] == [1, 2, 3, 4, 5, 6]
    assert [body["previous"] for body in begun] == [None, *[body["tx_id"] for body in begun[:-1]]]
    assert done.transaction_id == begun[-1]["tx_id"]
    assert len({effect.id for effect in world.effects("forward", "pay")}) == 6
    assert query(database_url, "SELECT count(*) FROM incidents") == [(1,)]
    intact(database_url)


async def test_no_rollback_is_asked_for_before_the_decision_to_abort_is_durable(sqlite_url: str, world: World) -> None:
    """And each undoing is recorded as intended before it is asked for, and as undone before the next one."""
    told: list[list[str]] = []

    class Watching(Remote):
        async def rollback(self, effect: Any) -> None:
            told.append(moves(sqlite_url))
            await super().rollback(effect)

    spine = over(
        sqlite_url,
        Watching(world, "one"),
        Watching(world, "two"),
        Watching(world, "three", after=["one", "two"], forward=raises(OSError("away"))),
    )
    async with running(spine):
        await failure(spine)
    assert world.told("rollback") == ["rollback three", "rollback two", "rollback one"]
    assert [seen[-1] for seen in told] == ["undo three", "undo two", "undo one"]
    assert [seen[-2] for seen in told] == ["aborting", "undone three", "undone two"]


async def test_an_undone_effect_is_acknowledged_with_what_was_undone_and_why(sqlite_url: str, world: World) -> None:
    """ROLLED_BACK with the result's id, the reason of the abort, and the error of a rollback that failed before."""
    pay = Remote(world, rollback=then(raises(OSError("line noise")), well), action="take_payment")
    no = Remote(world, "no", after=["pay"], forward=refuses("NO", "not today"))
    spine = over(sqlite_url, pay, no)
    async with running(spine):
        await failure(spine)
    rolled_back = {body["domain"]: body for body in journal(sqlite_url, "ack") if body["status"] == "ROLLED_BACK"}
    assert set(rolled_back) == {"pay", "no"}
    (effect,) = world.effects("forward", "pay")
    ack = rolled_back["pay"]
    assert (ack["action"], ack["result_id"]) == ("take_payment", f"pay-{effect.id}")
    assert "no: NO: not today" in ack["reason"]
    assert "line noise" in ack["error"]
    assert rolled_back["no"]["result_id"] == effect_id(effect.tx_id, "no")
    (undone,) = [body for body in journal(sqlite_url, "tx.step") if body.get("move") == "undone" and body["n"] == 3]
    assert undone["attempts"] == 2


async def test_what_stands_on_an_effect_that_is_not_undone_keeps_it(database_url: str, world: World) -> None:
    """The parcel cannot be called back, so the payment under it stays; what does not depend on it is undone."""
    parcel = Remote(world, "parcel", after=["label"], rollback=raises(OSError("on its way")))
    spine = over(
        database_url,
        Remote(world, "pay"),
        Remote(world, "label", after=["pay"]),
        parcel,
        Remote(world, "points"),
        Remote(world, "no", after=["parcel", "points"], forward=refuses()),
    )
    async with running(spine):
        error = await failure(spine)
        assert error.transaction_id is not None
        assert steps(database_url) == {
            "pay": "DONE",
            "label": "DONE",
            "parcel": "PARKED",
            "points": "ROLLED_BACK",
            "no": "ROLLED_BACK",
        }
        assert world.standing() == ["label", "parcel", "pay"]
        assert world.told("rollback") == ["rollback no", "rollback points", *["rollback parcel"] * 3]
        # Once it gives in, the rest follows in reverse.
        parcel.rollbacks = well
        world.calls.clear()
        await spine.retry(error.transaction_id, reason="the carrier agreed", actor="op")
        await until(lambda: transactions(database_url) == ["ABORTED"])
    assert world.told() == ["rollback parcel", "rollback label", "rollback pay"]
    assert world.standing() == []
    intact(database_url)


async def test_a_rollback_that_needed_several_tries_hides_no_steps_own_failure(sqlite_url: str, world: World) -> None:
    """What failed going forward is told of the step, and what failed going back only where that is acknowledged."""
    declined = raises(ValueError("card declined"))
    pay, ship = (then(raises(ConnectionError("hiccup")), well) for _ in range(2))
    spine = over(
        sqlite_url,
        Remote(world, rollback=pay),
        Remote(world, "ship", after=["pay"], forward=declined, rollback=ship),
    )
    async with running(spine):
        error = await failure(spine)
        why = str(await spine.why("run-1"))
    told = {entry["domain"]: entry["error"] for entry in error.partial_results["domains"]}
    assert told["pay"] is None
    assert "card declined" in told["ship"]
    assert "card declined" in why and "hiccup" not in why
    taken_back = [body["error"] for body in journal(sqlite_url, "ack") if body["status"] == "ROLLED_BACK"]
    assert taken_back == ["ConnectionError: hiccup"] * 2
