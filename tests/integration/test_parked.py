"""What could not be undone waits, visible, for an operator: tried again or ended on evidence, never by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from spine import Refused, RunFacts, Spine, Write
from spine.governance.units import GuardFailed
from spine.kernel.errors import ConfigurationError, JournalUnavailable
from tests.governed import intact, journal, query, running, together, until
from tests.participants import (
    Probed,
    Remote,
    World,
    acks,
    complete,
    failure,
    loses,
    over,
    raises,
    refuses,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def parked(spine: Spine, run_id: str = "run-1", **call: Any) -> str:
    """Complete a run so that it is parked; gives the transaction."""
    error = await failure(spine, run_id, **call)
    assert (error.phase, error.code) == ("PARKED", "PARKED"), error
    assert error.transaction_id is not None
    return error.transaction_id


def stubborn(url: str, world: World, **settings: Any) -> tuple[Spine, Remote]:
    """A Spine whose payment cannot be undone at the moment, and a second domain that makes that needed."""
    pay = Remote(world, rollback=raises(OSError("the bank is closed")))
    return behind(url, world, pay, **settings), pay


def behind(url: str, world: World, pay: Remote, **settings: Any) -> Spine:
    """A Spine whose second domain refuses once the payment is made."""
    return over(url, pay, Remote(world, "no", after=["pay"], forward=refuses()), **settings)


async def test_a_rollback_that_fails_is_parked_and_visible(sqlite_url: str, world: World) -> None:
    """The error, ``why``, health and every later completion say so; nothing ends by itself, nor by a restart."""
    spine, _ = stubborn(sqlite_url, world)
    async with running(spine):
        error = await failure(spine)
        assert (error.phase, error.code, error.failed_domain) == ("PARKED", "PARKED", "no")
        assert "'pay'" in error.message and "spine parked" in error.message
        states = {result.domain: result.state for result in error.domains}
        assert (states["pay"], states["no"]) == ("PARKED", "ROLLED_BACK")
        assert len(world.effects("rollback", "pay")) == 3
        assert transactions(sqlite_url) == ["PARKED"]
        assert query(sqlite_url, "SELECT state FROM runs") == [("parked",)]
        why = await spine.why("run-1")
        assert (why.verdict, why.cause.code) == ("parked", "OSError")
        assert "pay" in why.cause.text and "the bank is closed" in why.cause.text
        await until(lambda: spine.health().transactions["parked_now"] == 1)
        assert spine.health().transactions["parked"] == 1
        again = await failure(spine)
        assert (again.phase, again.code, again.transaction_id) == ("PARKED", "PARKED", error.transaction_id)
        (row,) = await spine._system.reader.parked()
        assert (row.tx_id, row.domain, row.tenant_id) == (error.transaction_id, "pay", "acme")
        assert "the bank is closed" in str(row.error)
    assert world.standing() == ["pay"]
    called = len(world.calls)
    later, _ = stubborn(sqlite_url, world)
    async with running(later):
        await until(lambda: later.health().transactions["parked_now"] == 1)
        assert (await failure(later)).code == "PARKED"
        # Another key is another completion.
        assert (await failure(later, completion_key="other")).transaction_id != error.transaction_id
    assert [call.effect.tx_id for call in world.calls[called:]].count(str(error.transaction_id)) == 0
    assert acks(sqlite_url)[:4] == [
        ("pay", "SUCCESS"),
        ("no", "FAILED"),
        ("no", "ROLLED_BACK"),
        ("orchestrator", "FAILED"),
    ]
    intact(sqlite_url)


@pytest.mark.parametrize("does", ["refuses", "fails", "changes nothing"])
async def test_a_local_domain_that_fails_parks_what_cannot_be_undone(sqlite_url: str, world: World, does: str) -> None:
    """However it fails, and the payment's rollback after it: the caller is told which failed and what is parked."""

    class Book:
        name, after = "book", ("pay",)

        def plan(self, run: RunFacts) -> list[Write]:
            if does == "refuses":
                raise Refused("CLOSED", "the books are closed")
            if does == "fails":
                raise KeyError("account")
            return [Write("UPDATE bills SET cents = 1 WHERE id = 'none'")]

    spine = over(sqlite_url, Remote(world, rollback=raises(OSError("the bank is closed"))), Book())
    async with running(spine):
        query(sqlite_url, "CREATE TABLE bills (id TEXT PRIMARY KEY, cents INTEGER NOT NULL)")
        error = await failure(spine)
        assert (error.phase, error.code, error.failed_domain) == ("PARKED", "PARKED", "book")
        assert {result.domain: result.state for result in error.domains}["pay"] == "PARKED"
        assert (await spine.why("run-1")).verdict == "parked"
    assert transactions(sqlite_url) == ["PARKED"]
    assert journal(sqlite_url, "tx.claimed") == []
    intact(sqlite_url)


async def test_what_is_parked_is_tried_again_when_an_operator_says_so(database_url: str, world: World) -> None:
    """Under a new epoch each time; parked again while it fails, undone once it works; then the run can be completed."""
    spine, pay = stubborn(database_url, world)
    async with running(spine):
        tx_id = await parked(spine)
        assert await spine._system.reader.parked_like(tx_id[:-1]) == (1, [tx_id])
        for round_ in (1, 2):
            told = await spine.retry(tx_id, reason="the bank opened", actor="op")
            assert (told["tx_id"], told["run_id"], told["state"]) == (tx_id, "run-1", "COMPENSATING")
            await until(lambda: transactions(database_url) == ["PARKED"])
            assert len(world.effects("rollback", "pay")) == 3 + 3 * round_
        pay.rollbacks = well
        await spine.retry(tx_id, reason="now it has", actor="op")
        await until(lambda: transactions(database_url) == ["ABORTED"])
        assert await spine._system.reader.parked_like(tx_id[:-1]) == (0, [])
        found = await spine._system.reader.transaction_like(tx_id[:-1])
        assert found is not None and (found.tx_id, found.state) == (tx_id, "ABORTED")
        why = await spine.why("run-1")
        assert (why.verdict, why.cause.code) == ("rolled_back", "NO_FUNDS")
        with pytest.raises(ConfigurationError, match="ABORTED, not PARKED"):
            await spine.retry(tx_id, reason="once more", actor="op")
        spine._participants[-1].domain.forwards = well  # type: ignore[union-attr]
        assert (await complete(spine)).is_complete
        why = await spine.why("run-1")
        assert why.verdict == "succeeded"
        assert "ABORTED; pay, no rolled back; because of domain no: NO_FUNDS: the account is empty" in str(why)
    epochs = [effect.epoch for effect in world.effects("rollback", "pay")]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) == 4
    retried = journal(database_url, "tx.retried")
    assert [(body["reason"], body["actor"]) for body in retried] == [
        ("the bank opened", "op"),
        ("the bank opened", "op"),
        ("now it has", "op"),
    ]
    assert acks(database_url, "pay")[:2] == [("pay", "SUCCESS"), ("pay", "ROLLED_BACK")]
    assert transactions(database_url) == ["ABORTED", "COMMITTED"]
    assert world.standing() == ["no", "pay"]
    intact(database_url)


async def test_what_is_parked_is_ended_by_an_operators_evidence(database_url: str, world: World) -> None:
    """No domain is asked; evidence, reason and operator are in the record and in the acknowledgement."""
    spine, _ = stubborn(database_url, world)
    async with running(spine):
        tx_id = await parked(spine)
        called = len(world.calls)
        told = await spine.resolve(tx_id, evidence="refund 77 at the counter", reason="bank down", actor="op")
        assert (told["tx_id"], told["state"]) == (tx_id, "ABORTED_MANUAL")
        why = await spine.why("run-1")
        assert why.verdict == "rolled_back"
        assert why.transaction is not None and why.transaction["state"] == "ABORTED_MANUAL"
        for again in (
            partial(spine.resolve, tx_id, evidence="e", reason="r", actor="op"),
            partial(spine.retry, tx_id, reason="r", actor="op"),
        ):
            with pytest.raises(ConfigurationError, match="ABORTED_MANUAL, not PARKED"):
                await again()
        assert len(world.calls) == called
        spine._participants[-1].domain.forwards = well  # type: ignore[union-attr]
        assert (await complete(spine)).is_complete
    (resolved,) = journal(database_url, "tx.resolved")
    assert (resolved["evidence"], resolved["reason"], resolved["actor"]) == (
        "refund 77 at the counter",
        "bank down",
        "op",
    )
    (ack,) = [
        body for body in journal(database_url, "ack") if (body["domain"], body["status"]) == ("pay", "ROLLED_BACK")
    ]
    assert "refund 77 at the counter" in ack["reason"] and "op" in ack["reason"]
    assert transactions(database_url) == ["ABORTED_MANUAL", "COMMITTED"]
    second = journal(database_url, "tx.begun")[1]
    assert (second["attempt"], second["previous"]) == (2, tx_id)
    intact(database_url)


BAD_TEXTS: list[Any] = ["", "   ", None, 5, b"x", ["x"], "x" * 4_001, "a\x00b", "\ud800"]


async def test_an_operator_is_told_what_is_wrong_with_what_it_asks(sqlite_url: str, world: World) -> None:
    """Whatever is given: a ConfigurationError that names the field, and the journal does not move."""
    spine, pay = stubborn(sqlite_url, world)
    async with running(spine):
        tx_id = await parked(spine)
        pay.rollbacks, spine._participants[-1].domain.forwards = well, well  # type: ignore[union-attr]
        committed = await complete(spine, "run-2")
        before = journal(sqlite_url)
        for value in BAD_TEXTS:
            for field in ("evidence", "reason", "actor"):
                given = {"evidence": "e", "reason": "r", "actor": "op", field: value}
                with pytest.raises(ConfigurationError, match=field) as raised:
                    await spine.resolve(tx_id, **given)
                assert isinstance(value, str) or "is empty" not in str(raised.value)
                if field != "evidence":
                    del given["evidence"]
                    with pytest.raises(ConfigurationError, match=field):
                        await spine.retry(tx_id, **given)
        for unknown in [*BAD_TEXTS, "nobody", "%", tx_id[:8], tx_id.upper() + "x", str(UUID(int=0)), {}]:
            with pytest.raises(ConfigurationError, match="transaction"):
                await spine.resolve(unknown, evidence="e", reason="r", actor="op")
            with pytest.raises(ConfigurationError, match="transaction"):
                await spine.retry(unknown, reason="r", actor="op")
        with pytest.raises(ConfigurationError, match="COMMITTED, not PARKED"):
            await spine.resolve(str(committed.transaction_id), evidence="e", reason="r", actor="op")
        assert journal(sqlite_url) == before
        await spine.resolve(tx_id, evidence="e\n\x1b[31m\u202e" + "x" * 3_900, reason="r" * 4_000, actor="op")
    (resolved,) = journal(sqlite_url, "tx.resolved")
    assert resolved["evidence"].endswith("x" * 3_900)
    assert resolved["reason"] == "r" * 4_000
    intact(sqlite_url)


async def test_operators_who_act_at_once_have_one_winner(database_url: str, world: World) -> None:
    """Retries and resolves of one transaction from two Spines: one is recorded, the others are told."""
    spine, _ = stubborn(database_url, world)
    other = over(database_url)
    ends: list[str] = []

    async def act(work: Any) -> None:
        try:
            ends.append((await work())["state"])
        except ConfigurationError as error:
            ends.append("told" if "moved on" in str(error) or "not PARKED" in str(error) else str(error))

    async with running(spine, other):
        tx_id = await parked(spine)
        resolve = {"evidence": "e", "reason": "r", "actor": "op"}
        await together(*[partial(act, partial(one.resolve, tx_id, **resolve)) for one in (spine, other)] * 3)
    assert sorted(ends) == ["ABORTED_MANUAL", *["told"] * 5]
    assert len(journal(database_url, "tx.resolved")) == 1
    intact(database_url)


async def test_a_retry_is_carried_out_by_whichever_spine_has_the_domains(sqlite_url: str, world: World) -> None:
    """The operator's own Spine declares none and lives on: it says so, and the application undoes the effect."""
    spine, pay = stubborn(sqlite_url, world)
    console = over(sqlite_url)
    async with running(spine, console):
        tx_id = await parked(spine)
        pay.rollbacks = well
        await console.retry(tx_id, reason="try again", actor="op")
        await until(lambda: transactions(sqlite_url) == ["ABORTED"], within_s=5)
    assert world.standing() == []


async def test_a_move_that_cannot_be_recorded_is_nobody_elses(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JournalUnavailable with the reason: that somebody moved it on is said only where somebody did."""
    spine, _ = stubborn(sqlite_url, world)
    async with running(spine):
        tx_id = await parked(spine)

        async def refuses_all(units: Sequence[Any]) -> list[GuardFailed]:
            return [GuardFailed("record: it has no end", 1, 0) for _ in units]

        with monkeypatch.context() as patched:
            patched.setattr(spine._system.writer, "commit", refuses_all)  # type: ignore[union-attr]
            with pytest.raises(JournalUnavailable, match=f"{tx_id} was not moved.*it has no end"):
                await spine.resolve(tx_id, evidence="e", reason="r", actor="op")
        await spine.resolve(tx_id, evidence="e", reason="r", actor="op")
        assert transactions(sqlite_url) == ["ABORTED_MANUAL"]
    intact(sqlite_url)


async def test_a_domain_may_refuse_completions_while_one_of_its_rollbacks_is_parked(
    sqlite_url: str, world: World
) -> None:
    """DOMAIN_PARKED before anything happened, on the record; another domain's parked rollback does not matter.

    What it declared counts, not what its attributes say later.
    """
    pay = Remote(world, rollback=raises(OSError("the bank is closed")), refuse_when_parked=True)
    spine = behind(sqlite_url, world, pay)
    pay.refuse_when_parked = False  # type: ignore[attr-defined]
    async with running(spine):
        tx_id = await parked(spine)
        called = len(world.calls)
        error = await failure(spine, "run-2")
        assert (error.code, error.failed_domain, error.phase) == ("DOMAIN_PARKED", "pay", "NOT_STARTED")
        assert len(world.calls) == called
        assert transactions(sqlite_url, "run-2") == []
        (refused,) = journal(sqlite_url, "tx.refused")
        assert (refused["run_id"], refused["code"]) == ("run-2", "DOMAIN_PARKED")
        assert (await spine.why("run-2")).verdict == "pending"
        await spine.resolve(tx_id, evidence="e", reason="r", actor="op")
        assert (await failure(spine, "run-2")).code == "PARKED"
    intact(sqlite_url)
    elsewhere = over(sqlite_url, Remote(world, "else", refuse_when_parked=True))
    async with running(elsewhere):
        assert (await complete(elsewhere, "run-3")).is_complete


async def test_a_rollback_is_not_repeated_when_the_domain_says_it_is_done(sqlite_url: str, world: World) -> None:
    """``status`` tells that a parked rollback took effect after all: nothing is called, the step is undone."""
    pay = Probed(world, rollback=loses(raises(OSError("the reply was lost"))))
    spine = over(sqlite_url, pay, Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(spine):
        tx_id = await parked(spine)
        assert world.standing() == []
        calls = len(world.effects("rollback", "pay"))
        await spine.retry(tx_id, reason="look again", actor="op")
        await until(lambda: transactions(sqlite_url) == ["ABORTED"])
    assert len(world.effects("rollback", "pay")) == calls == 3
    assert len(world.effects("status", "pay")) == 1
    intact(sqlite_url)
