"""Completions with domains outside: done in order before the commit, or undone in reverse."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
from contextlib import suppress
from datetime import UTC
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest

from actors.attempts import Attempts
from spine import (
    CompletionConflict,
    Refused,
    RollbackNotSupportedError,
    RunFacts,
    Spine,
    TransactionFailed,
    TransactionResult,
    Write,
)
from spine.domains import effect_id
from spine.governance.completion import CompleteRun, completion_digest
from spine.kernel.clock import VirtualClock
from spine.settings import Retry
from tests.governed import authority_fields, flowing, intact, journal, query, running, together, until
from tests.laws.world import kill
from tests.participants import (
    BUILT_IN,
    Held,
    Irreversible,
    Local,
    Probed,
    Remote,
    Sender,
    World,
    acks,
    complete,
    failure,
    hang,
    loses,
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

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]

# -- forward


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


# -- no, and no answer


async def test_a_refusal_is_final_and_is_undone_too(database_url: str, world: World) -> None:
    """Not tried again; the refused forward is rolled back as well, for its duplicate may still be on the way."""
    ship = Remote(world, "ship", after=["pay"], forward=refuses("NO_STOCK", "sold out"))
    spine = over(database_url, Remote(world), ship, Remote(world, "never", after=["ship"]))
    async with running(spine):
        error = await failure(spine)
        why = await spine.why("run-1")
    assert (error.code, error.failed_domain, error.phase) == ("NO_STOCK", "ship", "ROLLED_BACK")
    assert isinstance(error.cause, Refused)
    assert world.told() == ["forward pay", "forward ship", "rollback ship", "rollback pay"]
    assert moves(database_url) == [
        "begun", "intend pay", "done pay", "intend ship", "refused ship", "aborting",
        "undo ship", "undone ship", "undo pay", "undone pay", "aborted",
    ]  # fmt: skip
    assert steps(database_url) == {"pay": "ROLLED_BACK", "ship": "ROLLED_BACK", "never": "PLANNED"}
    assert acks(database_url) == [
        ("pay", "SUCCESS"),
        ("ship", "FAILED"),
        ("ship", "ROLLED_BACK"),
        ("pay", "ROLLED_BACK"),
        ("orchestrator", "FAILED"),
    ]
    assert journal(database_url, "event") == []
    assert query(database_url, "SELECT count(*) FROM incidents") == [(0,)]
    assert (why.verdict, why.cause.code) == ("rolled_back", "NO_STOCK")
    assert "ship" in why.cause.text and "sold out" in why.cause.text
    intact(database_url)


@pytest.mark.parametrize("attempts", [1, 2, 4])
async def test_a_failure_is_tried_again_as_often_as_the_domain_says(
    sqlite_url: str, world: World, attempts: int
) -> None:
    """Then it is UNKNOWN, with the error's type as code, and undone: it may have happened."""
    spine = over(sqlite_url, Remote(world, forward=loses(raises(ConnectionError("away"))), attempts=attempts))
    async with running(spine):
        error = await failure(spine)
    assert [effect.attempt for effect in world.effects("forward", "pay")] == list(range(1, attempts + 1))
    assert (error.code, error.failed_domain) == ("ConnectionError", "pay")
    assert "away" in error.message
    assert isinstance(error.cause, ConnectionError)
    assert "unknown pay" in moves(sqlite_url)
    assert world.standing() == []
    intact(sqlite_url)


@pytest.mark.parametrize("attempts", [2, 3])
async def test_an_attempt_that_succeeds_makes_good_for_those_that_failed(
    sqlite_url: str, world: World, attempts: int
) -> None:
    """Committed, nothing undone, and no trace of a failure in the result."""
    lost = loses(raises(ConnectionError("the reply was lost")))
    spine = over(sqlite_url, Remote(world, forward=then(*[lost] * (attempts - 1), well), attempts=attempts))
    async with running(spine):
        done = await complete(spine)
    assert done.all_domains_succeeded
    assert [result.error for result in done.domains] == [None] * 4
    assert len(world.effects("forward", "pay")) == attempts
    assert world.standing() == ["pay"]
    assert [move for move in moves(sqlite_url) if move.endswith("pay")] == ["intend pay", "done pay"]


@pytest.mark.parametrize("what", ["forward", "rollback"])
async def test_repeats_wait_twice_as_long_each_time_up_to_the_most(
    sqlite_url: str, world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First ``first_s``, then doubled, at most ``most_s``, each with at most a quarter of jitter on top."""
    monkeypatch.setattr("actors.takeover.TICK_S", 60.0)
    clock = VirtualClock(1_750_000_000_000_000)
    away = raises(ConnectionError("away"))
    pay = Remote(world, attempts=5, forward=away) if what == "forward" else Remote(world, rollback=away)
    no = Remote(world, "no", after=["pay"], forward=refuses() if what == "rollback" else well)
    spine = over(sqlite_url, pay, no, clock=clock, retry=Retry(attempts=5, first_s=0.1, most_s=0.5))
    async with running(spine), flowing(clock, times=10):
        with pytest.raises(TransactionFailed):
            await complete(spine)
    deadlines = [effect.deadline for effect in world.effects(what, "pay")]
    gaps = [later - sooner for sooner, later in pairwise(deadlines)]
    assert len(gaps) == 4
    for gap, least in zip(gaps, (0.1, 0.2, 0.4, 0.5), strict=True):
        # While a call fails and is looked at, the clock goes on a little.
        assert least <= gap <= least * 1.25 + 0.06, gaps


async def test_no_answer_in_time_is_tried_again_and_then_undone(sqlite_url: str, world: World) -> None:
    """Each attempt is cut off at its own deadline; the error says which domain and how long."""
    spine = over(sqlite_url, Remote(world, forward=loses(hang), timeout_s=0.05, attempts=2))
    async with running(spine):
        with anyio.fail_after(10):
            error = await failure(spine)
    assert (error.code, error.failed_domain) == ("TIMEOUT", "pay")
    assert "'pay'" in error.message and "0.05 s" in error.message
    first, second = world.effects("forward", "pay")
    assert second.deadline - first.deadline >= 0.05
    assert world.told() == ["forward pay", "forward pay", "rollback pay"]
    assert world.standing() == []
    intact(sqlite_url)


async def test_a_domain_that_will_not_be_cancelled_is_left_behind(sqlite_url: str, world: World) -> None:
    """It swallows its cancellation and acts late: by then it is rolled back, and its tombstone refuses it."""
    let_go = asyncio.Event()
    ended: list[str] = []

    async def stubborn(do: Any) -> Any:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()
        try:
            return do()
        except Refused as refusal:
            ended.append(refusal.code)
            raise

    spine = over(sqlite_url, Remote(world, forward=stubborn, timeout_s=0.05, attempts=1))
    async with running(spine):
        with anyio.fail_after(10):
            error = await failure(spine)
        assert error.code == "TIMEOUT"
        assert "still runs" in error.message
        let_go.set()
        await until(lambda: ended)
    assert ended == ["TOMBSTONED"]
    assert world.standing() == []


@pytest.mark.parametrize(
    "raised",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), BaseException("bare"), Exception()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("what", ["forward", "rollback", "status", "post"])
async def test_whatever_a_domain_raises_is_its_own_failure(
    sqlite_url: str, world: World, what: str, raised: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends neither the loop nor the Spine, and is tried again like any other failure."""
    monkeypatch.setattr("actors.outbox.RELOAD_S", 600.0)
    bad = then(raises(raised), well)
    pay = Remote(world, forward=bad if what == "forward" else well, rollback=bad if what == "rollback" else well)
    if what == "status":
        pay = Probed(
            world, forward=refuses(), rollback=then(raises(OSError()), raises(OSError()), raises(OSError()), well)
        )

        async def status(effect: Any) -> Any:
            world.called("pay", "status", effect)
            raise raised

        pay.status = status  # type: ignore[method-assign]
    no = [Remote(world, "no", after=["pay"], forward=refuses())] if what == "rollback" else []
    spine = over(sqlite_url, pay, *no, Sender(world, post=bad if what == "post" else well))
    async with running(spine):
        if what in ("rollback", "status"):
            error = await failure(spine)
            if what == "status":
                assert error.transaction_id is not None
                await spine.retry(error.transaction_id, reason="again", actor="op")
                await until(lambda: transactions(sqlite_url) == ["ABORTED"])
        else:
            assert (await complete(spine)).is_complete
            await until(lambda: "mail" in world.standing())
        assert spine.health().ok
        assert spine.health().restarts == 0
    assert "pay" in world.standing() if what in ("forward", "post") else world.standing() == []
    intact(sqlite_url)


async def test_a_slow_domain_delays_no_other_completion(sqlite_url: str, world: World) -> None:
    """Each transaction is driven in a task of its own."""
    held = Held()

    async def by_run(do: Any) -> Any:
        effect = world.calls[-1].effect
        return await (held(do) if effect.run_id == "slow" else well(do))

    spine = over(sqlite_url, Remote(world, forward=by_run))
    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(complete, spine, "slow")
        await held.reached.wait()
        await together(*[partial(complete, spine, f"run-{n}") for n in range(10)])
        assert transactions(sqlite_url, "slow") == ["EXECUTING"]
        assert (await spine.why("slow")).verdict == "pending"
        held.let_go.set()
    assert transactions(sqlite_url, "slow") == ["COMMITTED"]


async def test_more_calls_at_once_than_are_allowed_are_tried_again(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on calls under way is felt as a failed attempt, not as a lost one."""
    monkeypatch.setattr("actors.effect_calls.CALLS_MOST", 2)
    spine = over(sqlite_url, Remote(world, attempts=50), retry=Retry(attempts=50, first_s=0.001, most_s=0.01))
    async with running(spine):
        done = await together(*[partial(complete, spine, f"run-{n}") for n in range(8)])
    assert all(result.is_complete for result in done)
    assert world.standing() == ["pay"] * 8
    # A call that was refused was never made: nothing is left that nobody awaits.
    gc.collect()


# -- back


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


# -- before anything happens


async def test_a_domain_that_cannot_be_undone_is_refused_before_anything_happens(sqlite_url: str, world: World) -> None:
    """RollbackNotSupportedError names it and the way out: nobody is called, nothing begins, and it is recorded."""
    spine = over(sqlite_url, Remote(world), Irreversible(world))
    async with running(spine):
        for run_id in ("run-1", "run-2"):
            with pytest.raises(RollbackNotSupportedError, match=r"'mail' has no rollback.*POST"):
                await complete(spine, run_id)
        await spine.start_run("run-3", tenant_id="acme")
        with pytest.raises(RollbackNotSupportedError):
            await complete(spine, "run-3")
        assert (await spine.why("run-3")).verdict == "pending"
    assert world.calls == []
    assert query(sqlite_url, "SELECT count(*) FROM transactions") == [(0,)]
    assert query(sqlite_url, "SELECT run_id, state FROM runs ORDER BY run_id") == [
        ("run-1", "open"),
        ("run-2", "open"),
        ("run-3", "open"),
    ]
    refused = journal(sqlite_url, "tx.refused")
    assert [(body["run_id"], body["code"]) for body in refused] == [
        (run_id, "ROLLBACK_NOT_SUPPORTED") for run_id in ("run-1", "run-2", "run-3")
    ]
    intact(sqlite_url)
    mended = over(sqlite_url, Remote(world))
    async with running(mended):
        assert (await complete(mended)).is_complete


async def test_a_refused_beginning_is_on_record_however_many_come_at_once(sqlite_url: str, world: World) -> None:
    """Refused completions of runs that nobody has started, from two Spines: a record of each, and one start of each."""
    spines = [over(sqlite_url, Irreversible(world)) for _ in range(2)]

    async def one(number: int) -> None:
        with pytest.raises(RollbackNotSupportedError):
            await complete(spines[number % 2], f"run-{number // 4}", completion_key=str(number))

    async with running(*spines):
        await together(*[partial(one, number) for number in range(40)])
    assert sorted(int(body["completion_key"]) for body in journal(sqlite_url, "tx.refused")) == list(range(40))
    assert len(journal(sqlite_url, "run.started")) == 10


async def test_a_completion_that_stands_is_given_even_when_none_could_begin(sqlite_url: str, world: World) -> None:
    """What was committed before a domain lost its rollback is answered from the record."""
    before = over(sqlite_url, Remote(world))
    async with running(before):
        done = await complete(before)
    after = over(sqlite_url, Irreversible(world))
    async with running(after):
        assert (await complete(after)).transaction_id == done.transaction_id


async def test_another_tenants_run_is_not_completed_and_no_domain_hears_of_it(sqlite_url: str, world: World) -> None:
    """TENANT_MISMATCH before anything."""
    spine = over(sqlite_url, Remote(world), Sender(world))
    async with running(spine):
        await spine.start_run("run-1", tenant_id="acme")
        error = await failure(spine, tenant_id="other")
    assert error.code == "TENANT_MISMATCH"
    assert world.calls == []


# -- what callers are told


async def test_the_error_of_a_completion_tells_everything_of_it(sqlite_url: str, world: World) -> None:
    """Message, phase, cause, code, domain, partial results with every domain; and it survives pickling."""
    ship = Remote(world, "ship", after=["pay"], forward=raises(ConnectionError("no route")), action="send_parcel")
    spine = over(sqlite_url, Remote(world), ship)
    async with running(spine):
        error = await failure(spine)
    assert isinstance(error.cause, ConnectionError)
    assert error.__cause__ is error.cause
    assert (error.phase, error.code, error.failed_domain) == ("ROLLED_BACK", "ConnectionError", "ship")
    for named in ("run-1", "ship", "ConnectionError", "no route", str(error.transaction_id)):
        assert named in error.message
    assert str(error) == error.message
    partial_results = error.partial_results
    assert (partial_results["run_id"], partial_results["phase"]) == ("run-1", "ROLLED_BACK")
    assert partial_results["is_complete"] is False
    assert authority_fields(partial_results["metadata"]) == []
    found = {result.domain: result for result in error.domains}
    assert list(found) == [*BUILT_IN, "pay", "ship"]
    assert not any(result.success for result in error.domains)
    assert (found["ship"].code, found["ship"].error, found["ship"].action) == (
        "ConnectionError",
        "ConnectionError: no route",
        "send_parcel",
    )
    assert (found["pay"].state, found["ship"].state) == ("ROLLED_BACK", "ROLLED_BACK")
    assert found["pay"].result_id == f"pay-{world.effects('forward', 'pay')[0].id}"
    copied = pickle.loads(pickle.dumps(error))
    assert isinstance(copied, TransactionFailed)
    assert copied.domains == error.domains
    assert (copied.message, copied.phase, copied.code) == (error.message, error.phase, error.code)


async def test_the_result_fills_the_fields_that_workers_know(sqlite_url: str, world: World) -> None:
    """Incident, policy and trace results are there beside the domains outside, and survive the record."""
    spine = over(sqlite_url, Remote(world), Sender(world))
    async with running(spine):
        done = await complete(spine, agent_id="a7")
    for name, legacy in zip(BUILT_IN, (done.incident_result, done.policy_result, done.trace_result), strict=True):
        assert legacy is not None
        assert (legacy.domain, legacy.success, legacy.state) == (name, True, "DONE")
        assert legacy.result_id and legacy.timestamp is not None and legacy.timestamp.tzinfo is UTC
    assert (done.phase, done.events_published, done.is_complete) == ("EVENTS_PUBLISHED", ["run.completed"], True)
    assert (done.run_id, done.tenant_id, done.run_status) == ("run-1", "acme", "succeeded")
    assert TransactionResult.from_dict(done.to_dict()) == done
    body = done.to_dict()
    assert (body["incident"]["domain"], body["policy"]["domain"], body["trace"]["domain"]) == BUILT_IN


async def test_the_same_completion_again_gives_the_stored_result_and_asks_nobody(sqlite_url: str, world: World) -> None:
    """Now, and from the next process."""
    spine, other = (over(sqlite_url, Remote(world), Sender(world)) for _ in range(2))
    async with running(spine):
        first = await complete(spine)
        again = await complete(spine)
    async with running(other):
        later = await complete(other)
    assert again.to_dict() == later.to_dict() == first.to_dict() | {"duration_ms": again.duration_ms}
    assert world.told("forward") == ["forward pay"]


async def test_another_payload_under_a_taken_key_is_a_conflict_that_names_both(sqlite_url: str, world: World) -> None:
    """While the first is under way and after it has committed; both digests, the key and the transaction are named."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=held))
    digests = [
        completion_digest(CompleteRun(run_id="run-1", tenant_id="acme", run_status=status))
        for status in ("succeeded", "failed")
    ]

    async def conflict() -> None:
        with pytest.raises(CompletionConflict) as raised:
            await complete(spine, status="failed")
        (begun,) = journal(sqlite_url, "tx.begun")
        for named in ("run-1", begun["tx_id"], *(digest[:16] for digest in digests)):
            assert named in str(raised.value)

    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(complete, spine)
        await held.reached.wait()
        other = over(sqlite_url, Remote(world))
        async with running(other):
            with pytest.raises(CompletionConflict, match=digests[1][:16]):
                await complete(other, status="failed")
        held.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
        await conflict()
    assert transactions(sqlite_url) == ["COMMITTED"]
    assert world.told() == ["forward pay"]


async def test_many_who_complete_one_run_at_once_make_one_transaction(database_url: str, world: World) -> None:
    """Five callers on each of two Spines, while the domain takes its time: one transaction, one call, one result."""
    held = Held()
    here, there = (over(database_url, Remote(world, forward=held)) for _ in range(2))
    results: list[TransactionResult] = []

    async def one(spine: Spine) -> None:
        results.append(await complete(spine))

    async with running(here, there), anyio.create_task_group() as group:
        for spine in (here, there) * 5:
            group.start_soon(one, spine)
        with anyio.fail_after(20):
            await held.reached.wait()
            await until(lambda: len(journal(database_url, "tx.begun")) == 1)
            held.let_go.set()
            await until(lambda: len(results) == 10)
    assert len({result.transaction_id for result in results}) == 1
    assert all(result.is_complete for result in results)
    assert len({repr(result.domains) for result in results}) == 1
    assert world.told() == ["forward pay"]
    assert transactions(database_url) == ["COMMITTED"]
    intact(database_url)


@pytest.mark.parametrize("end", ["ROLLED_BACK", "PARKED"])
async def test_many_who_complete_one_run_at_once_are_told_the_same_failure(
    sqlite_url: str, world: World, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five callers on each of two Spines: one attempt, one error for all; who asks after that begins a new attempt."""
    reached, let_go, waits = asyncio.Event(), asyncio.Event(), asyncio.Event()
    wait_for = Attempts._wait_for

    async def noted(*arguments: Any) -> None:
        waits.set()
        await wait_for(*arguments)

    async def held_back(do: Any) -> Any:
        reached.set()
        await let_go.wait()
        raise Refused("NO_FUNDS", "the account is empty")

    monkeypatch.setattr(Attempts, "_wait_for", noted)
    rollback = well if end == "ROLLED_BACK" else raises(OSError("away"))
    domains = [Remote(world, rollback=rollback), Remote(world, "no", after=["pay"], forward=held_back)]
    here, there = over(sqlite_url, *domains), over(sqlite_url, *domains)
    async with running(here, there):
        callers = [asyncio.ensure_future(failure(spine)) for spine in (here, there) * 5]
        with anyio.fail_after(20):
            await reached.wait()
            # One of each Spine's callers looks after the transaction, the others wait for that one.
            await waits.wait()
            let_go.set()
            errors = await asyncio.gather(*callers)
        assert {(error.phase, error.transaction_id) for error in errors} == {(end, errors[0].transaction_id)}
        assert len({repr(error.domains) for error in errors}) == 1
        for error in errors:
            assert "pay" in error.message or "account is empty" in error.message
        assert world.told("forward") == ["forward pay", "forward no"]
        again = await failure(here)
        assert (again.transaction_id != errors[0].transaction_id) == (end == "ROLLED_BACK")
    assert len(transactions(sqlite_url)) == (2 if end == "ROLLED_BACK" else 1)
    intact(sqlite_url)


async def test_a_hundred_completions_at_once_each_end_their_own_way(database_url: str, world: World) -> None:
    """Every fourth is refused, every fourth loses its reply once, and nobody's end is another's."""
    flaky: dict[str, int] = {}

    async def by_run(do: Any) -> Any:
        run_id = world.calls[-1].effect.run_id
        await asyncio.sleep(0)
        match int(run_id) % 4:
            case 0:
                raise Refused("NO", run_id)
            case 1 if flaky.setdefault(run_id, 0) == 0:
                flaky[run_id] = 1
                do()
                raise ConnectionError(run_id)
            case _:
                return do()

    spine = over(database_url, Remote(world), Remote(world, "ship", after=["pay"], forward=by_run))
    ended: dict[int, str] = {}

    async def one(number: int) -> None:
        try:
            ended[number] = (await complete(spine, str(number))).phase.value
        except TransactionFailed as error:
            ended[number] = str(error.code) if str(number) in str(error) else str(error)

    async with running(spine):
        with anyio.fail_after(40):
            await together(*[partial(one, number) for number in range(100)])
        counts = spine.health().transactions
    refused = {number for number in range(100) if number % 4 == 0}
    assert {number for number, end in ended.items() if end == "NO"} == refused
    assert {end for number, end in ended.items() if number not in refused} <= {"COMMITTED", "EVENTS_PUBLISHED"}
    assert world.standing() == ["pay"] * 75 + ["ship"] * 75
    assert (counts["committed"], counts["aborted"], counts["compensated"]) == (75, 25, 50)
    states = dict(query(database_url, "SELECT state, count(*) FROM transactions GROUP BY state"))
    assert states == {"COMMITTED": 75, "ABORTED": 25}
    intact(database_url)


# -- who asked goes away, and so does the Spine


@pytest.mark.parametrize("good", [True, False], ids=["committing", "undoing"])
async def test_a_completion_goes_on_when_its_caller_is_cancelled(sqlite_url: str, world: World, good: bool) -> None:
    """Its end is in the record and is what the next caller is told."""
    held = Held()
    pay = Remote(world, forward=held if good else well, rollback=held)
    no = Remote(world, "no", after=["pay"], forward=well if good else refuses())
    spine = over(sqlite_url, pay, no)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await held.reached.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert transactions(sqlite_url) == ["EXECUTING" if good else "COMPENSATING"]
        held.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["COMMITTED" if good else "ABORTED"])
        if good:
            assert (await complete(spine)).is_complete
        else:
            assert (await spine.why("run-1")).verdict == "rolled_back"
    assert len(journal(sqlite_url, "tx.begun")) == 1
    assert world.standing() == (["no", "pay"] if good else [])
    intact(sqlite_url)


async def test_a_completion_goes_on_when_its_caller_has_waited_long_enough(sqlite_url: str, world: World) -> None:
    """The caller is told that started work goes on; what it came to is in the record."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=held))
    told: list[BaseException | None] = []
    request = CompleteRun(run_id="run-1", tenant_id="acme", run_status="succeeded")
    async with running(spine):
        spine.post(request, timeout_s=0.3, on_done=lambda value, error: told.append(error))
        await held.reached.wait()
        await until(lambda: told)
        (error,) = told
        assert isinstance(error, TransactionFailed)
        assert error.code == "TIMEOUT"
        assert "goes on" in error.message
        held.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
        assert (await complete(spine)).is_complete
    assert world.told() == ["forward pay"]


@pytest.mark.parametrize("applied", [True, False])
async def test_a_stop_gives_a_call_under_way_up_and_undoes_it(sqlite_url: str, world: World, applied: bool) -> None:
    """Within the stop the effect is UNKNOWN, undone and recorded; the caller is told; the next start finds no work."""
    reached = asyncio.Event()

    async def forward(do: Any) -> Any:
        if applied:
            do()
        reached.set()
        await hang(do)

    spine = over(sqlite_url, Remote(world), Remote(world, "ship", after=["pay"], forward=forward), drain_s=0.05)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await reached.wait()
        receipts = await spine.stop()
        with pytest.raises(TransactionFailed) as raised:
            await caller
    assert [receipt.end for receipt in receipts] == ["clean"] * 4
    assert (raised.value.code, raised.value.failed_domain) == ("INTERRUPTED", "ship")
    assert transactions(sqlite_url) == ["ABORTED"]
    assert moves(sqlite_url)[-7:] == [
        "unknown ship", "aborting", "undo ship", "undone ship", "undo pay", "undone pay", "aborted"
    ]  # fmt: skip
    assert world.standing() == []
    later = over(sqlite_url, Remote(world), Remote(world, "ship", after=["pay"]))
    async with running(later):
        done = await complete(later)
    assert done.is_complete
    assert transactions(sqlite_url) == ["ABORTED", "COMMITTED"]
    intact(sqlite_url)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "fails"])
async def test_a_stop_during_a_rollback_leaves_it_to_the_next_start(sqlite_url: str, world: World, hangs: bool) -> None:
    """The stop does not wait for ever, nor does it park what only lacked time: the next Spine goes on and ends it."""
    reached = asyncio.Event()

    async def rollback(do: Any) -> Any:
        reached.set()
        if hangs:
            await hang(do)
        raise OSError("away")

    slow = Retry(attempts=100, first_s=0.02, most_s=0.02)
    no = Remote(world, "no", after=["pay"], forward=refuses())
    spine = over(sqlite_url, Remote(world, rollback=rollback), no, drain_s=0.05, retry=slow)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await reached.wait()
        with anyio.fail_after(10):
            await spine.stop()
        with pytest.raises((TransactionFailed, asyncio.CancelledError)) as raised:
            await caller
    if isinstance(raised.value, TransactionFailed):
        assert raised.value.code in ("IN_FLIGHT", "INTERRUPTED", "JOURNAL_UNAVAILABLE")
    assert transactions(sqlite_url) == ["COMPENSATING"]
    assert steps(sqlite_url) == {"pay": "RB_INTENT", "no": "ROLLED_BACK"}
    later = over(sqlite_url, Remote(world), Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(later):
        await until(lambda: transactions(sqlite_url) == ["ABORTED"])
        await until(lambda: later.health().transactions["recovered"] == 1)
    assert world.standing() == []
    assert world.effects("rollback", "pay")[-1].epoch == 2
    assert [move for move in moves(sqlite_url) if move.startswith(("claimed", "aborted"))] == ["claimed", "aborted"]
    intact(sqlite_url)


async def test_a_killed_coordinator_leaves_its_transactions_to_its_next_incarnation(
    sqlite_url: str, world: World
) -> None:
    """Killed while one rollback and one forward are under way: both end, each once, and new work is taken."""
    stuck = Held()
    reached: set[str] = set()

    async def forward(do: Any) -> Any:
        run_id = world.calls[-1].effect.run_id
        if run_id == "forward" and run_id not in reached:
            reached.add(run_id)
            do()
            await hang(do)
        return do()

    async def rollback(do: Any) -> Any:
        if not stuck.reached.is_set():
            stuck.reached.set()
            await hang(do)
        return do()

    no = Remote(world, "no", after=["pay"], forward=refuses())
    spine = over(sqlite_url, Remote(world, forward=forward, rollback=rollback), no)
    ends: dict[str, BaseException | None] = {}

    async def one(run_id: str) -> None:
        try:
            await complete(spine, run_id)
        except Exception as error:
            ends[run_id] = error

    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(one, "back")
        await stuck.reached.wait()
        group.start_soon(one, "forward")
        await until(lambda: reached)
        await kill(spine, "coordinator")
        await until(lambda: set(ends) == {"back", "forward"})
        await until(lambda: not query(sqlite_url, "SELECT 1 FROM transactions WHERE state <> 'ABORTED'"))
        assert spine.health().ok
        no.forwards = well
        for run_id in ("back", "forward", "new"):
            assert (await complete(spine, run_id)).is_complete
    assert world.standing() == ["no"] * 3 + ["pay"] * 3
    assert transactions(sqlite_url, "back") == transactions(sqlite_url, "forward") == ["ABORTED", "COMMITTED"]
    claimed = [body["run_id"] for body in journal(sqlite_url, "tx.claimed")]
    assert claimed == ["back"]
    intact(sqlite_url)


# -- switches of the process

SWITCHED = """
import asyncio, sys
from spine import Refused, Spine

class Pay:
    name, after, timeout_s, attempts = "pay", (), 5, 1
    async def forward(self, effect):
        print("forward")
        raise Refused("NO", "not today")
    async def rollback(self, effect):
        print("rollback")

async def main():
    async with Spine(sys.argv[1], domains=[Pay()]) as spine:
        try:
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        except Exception as error:
            print(type(error).__name__, error.code)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("switch", "said", "found"),
    [
        ("RAC_ROLLBACK_AUDIT_ENABLED", ["forward", "rollback", "TransactionFailed NO"], ["FAILED", "FAILED"]),
        ("TRANSACTION_COORDINATOR_ENABLED", ["TransactionFailed COORDINATOR_DISABLED"], []),
        ("NONE", ["forward", "rollback", "TransactionFailed NO"], ["FAILED", "ROLLED_BACK", "FAILED"]),
    ],
)
def test_a_process_may_be_told_to_leave_out_a_part(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, switch: str, said: list[str], found: list[str]
) -> None:
    """Without the rollback audit nothing else changes; without the coordinator a completion is refused, recorded."""
    monkeypatch.setenv(switch, "false")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SWITCHED, sqlite_url],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout.splitlines() == said
    assert [status for _, status in acks(sqlite_url)] == found
    if switch == "TRANSACTION_COORDINATOR_ENABLED":
        assert [body["code"] for body in journal(sqlite_url, "tx.refused")] == ["COORDINATOR_DISABLED"]
        assert transactions(sqlite_url) == []
    else:
        assert steps(sqlite_url) == {"pay": "ROLLED_BACK"}
    intact(sqlite_url)
