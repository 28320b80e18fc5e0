"""Domains outside are asked in order before the commit; what they are given and what they return is recorded."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import anyio
import pytest

from spine import Refused, RunFacts, Write
from spine.domains import effect_id
from tests.governed import intact, journal, query, running, until
from tests.participants import (
    BUILT_IN,
    Local,
    Remote,
    Sender,
    World,
    acks,
    complete,
    failure,
    moves,
    over,
    raises,
    returns,
    steps,
    then,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_domains_outside_are_asked_in_order_and_then_all_commits(database_url: str, world: World) -> None:
    """``after`` decides, whatever the order of declaration; each intent stands before its call, nothing is undone."""
    told: dict[str, list[str]] = {}

    class Watching(Remote):
        async def forward(self, effect: Any) -> Any:
            told[self.name] = moves(database_url)
            return await super().forward(effect)

    names = [Watching(world, "ship", after=["pay"]), Watching(world, "tell", after=["ship"]), Watching(world, "pay")]
    spine = over(database_url, *names)
    async with running(spine):
        done = await complete(spine)
        why = await spine.why("run-1")
    assert world.told() == ["forward pay", "forward ship", "forward tell"]
    assert told["pay"] == ["begun", "intend pay"]
    assert told["ship"] == ["begun", "intend pay", "done pay", "intend ship"]
    assert moves(database_url)[-3:] == ["intend tell", "done tell", "committed"]
    assert [result.domain for result in done.domains] == [*BUILT_IN, "pay", "ship", "tell"]
    assert done.is_complete and done.all_domains_succeeded
    assert world.standing() == ["pay", "ship", "tell"]
    results = {result.domain: result for result in done.domains}
    (effect,) = world.effects("forward", "pay")
    assert (results["pay"].result_id, results["pay"].state, results["pay"].domain_class) == (
        f"pay-{effect.id}",
        "DONE",
        "EXTERNAL",
    )
    assert acks(database_url, "pay", "ship", "tell") == [(name, "SUCCESS") for name in ("pay", "ship", "tell")]
    assert (why.verdict, why.contract["overall"] if why.contract else None) == ("succeeded", "COMPLETE")
    intact(database_url)


async def test_an_effect_says_which_transaction_it_is_of(sqlite_url: str, world: World) -> None:
    """Its id is derived from transaction and domain, so every attempt has the same; attempts count from 1."""
    pay = Remote(world, forward=then(raises(ConnectionError("away")), well), timeout_s=7)
    spine = over(sqlite_url, pay)
    async with running(spine):
        before = spine._settings.clock.monotonic()
        done = await complete(spine, completion_key="key")
    first, second = world.effects("forward", "pay")
    assert done.transaction_id is not None
    assert first.id == second.id == effect_id(done.transaction_id, "pay")
    assert (first.tx_id, first.run_id, first.tenant_id) == (done.transaction_id, "run-1", "acme")
    assert (first.epoch, second.epoch, first.attempt, second.attempt) == (1, 1, 1, 2)
    assert before + 7 <= first.deadline < before + 60
    assert first.descriptor == second.descriptor
    assert first.descriptor["run_status"] == "succeeded"
    assert first.descriptor["completion_key"] == "key"
    (intent,) = [body for body in journal(sqlite_url, "tx.step") if body.get("move") == "intend"]
    assert (intent["effect_id"], intent["descriptor"]) == (first.id, first.descriptor)


async def test_a_domain_describes_its_effect_and_knows_what_those_before_it_returned(
    sqlite_url: str, world: World
) -> None:
    """``describe(run)`` becomes the descriptor, recorded with the intent; rollback and POST get their own again."""
    described: list[RunFacts] = []

    def describe(run: RunFacts) -> dict[str, Any]:
        described.append(run)
        return {"amount": 5, "to": run.results.get("pay", {}).get("id"), "effect": run.effect_id}

    pay = Remote(world, describe=describe)
    ship = Remote(world, "ship", after=["pay"], describe=describe)
    mail = Sender(world, after=["ship"], describe=describe)
    spine = over(sqlite_url, mail, ship, pay)
    async with running(spine):
        await complete(spine)
        await until(lambda: world.effects("post", "mail"))
    (paid,), (shipped,), (mailed,) = (
        world.effects("forward", "pay"), world.effects("forward", "ship"), world.effects("post", "mail")
    )  # fmt: skip
    assert paid.descriptor == {"amount": 5, "to": None, "effect": paid.id}
    assert shipped.descriptor == {"amount": 5, "to": f"pay-{paid.id}", "effect": shipped.id}
    assert mailed.descriptor == {"amount": 5, "to": f"pay-{paid.id}", "effect": mailed.id}
    assert [set(run.results) for run in described] == [set(), {"pay"}, {"pay", "ship"}]


async def test_a_local_domain_uses_what_a_domain_outside_returned(sqlite_url: str, world: World) -> None:
    """``run.results`` holds it; rows of the user's table name it and join the commit."""
    table = "CREATE TABLE receipts (run_id TEXT PRIMARY KEY, payment TEXT NOT NULL)"

    class Receipts:
        name, after = "receipts", ("pay",)

        def plan(self, run: RunFacts) -> list[Write]:
            values = {"run": run.run_id, "payment": run.results["pay"]["id"]}
            return [Write("INSERT INTO receipts VALUES (:run, :payment)", values)]

    spine = over(sqlite_url, Receipts(), Remote(world))
    async with running(spine):
        query(sqlite_url, table)
        done = await complete(spine)
    (payment,) = [result.result_id for result in done.domains if result.domain == "pay"]
    assert query(sqlite_url, "SELECT * FROM receipts") == [("run-1", payment)]
    intact(sqlite_url)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({}, None),
        ({"id": ""}, None),
        ({"id": 5}, None),
        ({"id": "receipt-7", "more": [1, {"deep": True}]}, "receipt-7"),
    ],
    ids=repr,
)
async def test_what_a_domain_returns_is_kept_and_its_id_is_the_results(
    sqlite_url: str, world: World, given: Any, expected: str | None
) -> None:
    """A mapping, or nothing; without an id of its own the effect's stands."""
    seer = Local([], after=["pay"])
    spine = over(sqlite_url, Remote(world, forward=returns(given)), seer)
    async with running(spine):
        done = await complete(spine)
    (effect,) = world.effects("forward", "pay")
    (found,) = [result for result in done.domains if result.domain == "pay"]
    assert found.result_id == (expected or effect.id)
    assert seer.seen[0].results == {"pay": given or {}}


BAD_RESULTS: dict[str, tuple[Any, str]] = {
    "a list": (["x"], "not a mapping"),
    "text": ("done", "not a mapping"),
    "a number": (5, "not a mapping"),
    "an object inside": ({"x": object()}, "is not JSON"),
    "not a number inside": ({"x": float("nan")}, "is not JSON"),
    "half a character": ({"x": "\ud800"}, "is not JSON"),
    "too big": ({"x": "y" * 1_100_000}, "bytes as JSON"),
}


@pytest.mark.parametrize("kind", BAD_RESULTS)
async def test_a_result_that_cannot_be_recorded_is_undone(sqlite_url: str, world: World, kind: str) -> None:
    """It happened, but nobody could be told of it again: UNKNOWN, rolled back, and the error says what is wrong."""
    value, text = BAD_RESULTS[kind]
    spine = over(sqlite_url, Remote(world, forward=returns(value)))
    async with running(spine):
        error = await failure(spine)
    assert error.failed_domain == "pay"
    assert text in error.message
    assert "unknown pay" in moves(sqlite_url)
    assert world.told() == ["forward pay", "rollback pay"]
    assert world.standing() == []
    intact(sqlite_url)


@pytest.mark.parametrize(
    ("describe", "code"),
    [
        (lambda run: run.results["nobody"], "KeyError"),
        (lambda run: "text", "TypeError"),
        (lambda run: None, "TypeError"),
        (lambda run: {"x": object()}, "ValueError"),
        (lambda run: {"x": "y" * 1_100_000}, "ValueError"),
        (lambda run: (_ for _ in ()).throw(Refused("TOO_DEAR", "over the limit")), "TOO_DEAR"),
        (lambda run: sys.exit(1), "SystemExit"),
        (lambda run: (_ for _ in ()).throw(asyncio.CancelledError()), "CancelledError"),
    ],
    ids=["raises", "text", "nothing", "not JSON", "too big", "refuses", "exits", "cancels"],
)
@pytest.mark.parametrize("after_commit", [False, True], ids=["EXTERNAL", "POST"])
async def test_a_description_that_fails_rolls_back_what_was_done_before_it(
    sqlite_url: str, world: World, describe: Any, code: str, after_commit: bool
) -> None:
    """The domain itself was never asked, so it is not asked to undo anything either."""
    bad = (Sender if after_commit else Remote)(world, "bad", after=["pay"], describe=describe)
    spine = over(sqlite_url, bad, Remote(world))
    async with running(spine):
        with anyio.fail_after(5):
            error = await failure(spine)
    assert (error.failed_domain, error.code) == ("bad", code)
    assert world.told() == ["forward pay", "rollback pay"]
    assert transactions(sqlite_url) == ["ABORTED"]
    if not after_commit:
        assert steps(sqlite_url) == {"pay": "ROLLED_BACK", "bad": "PLANNED"}
    intact(sqlite_url)
