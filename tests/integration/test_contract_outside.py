"""The verdict over a run's contract where domains outside take part: in the very commit that brings it about."""

from __future__ import annotations

from typing import Any

import pytest

from spine.governance.contract import FINALIZE
from tests.governed import Published, intact, journal, query, running, until
from tests.participants import (
    Held,
    Remote,
    Sender,
    World,
    acks,
    complete,
    failure,
    over,
    raises,
    refuses,
    then,
    transactions,
    well,
)

# Nobody sweeps here: what is wrong in the record stays wrong.
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("unswept")]


def verdicts(url: str) -> list[dict[str, Any]]:
    return journal(url, "contract.reconciled")


def failed(verdict: dict[str, Any]) -> list[str]:
    return sorted(f"{finding['domain']}/{finding['action']}" for finding in verdict["failed"])


def unit_of(url: str, kind: str) -> str:
    """The unit of the last record of that kind."""
    return str(journal(url, kind)[-1]["unit"])


@pytest.mark.parametrize("started", [True, False])
async def test_a_commit_judges_its_run(database_url: str, world: World, started: bool) -> None:
    spine = over(database_url, Remote(world))
    async with running(spine):
        if started:
            await spine.start_run("run-1", tenant_id="acme")
        await complete(spine)
    (verdict,) = verdicts(database_url)
    assert (verdict["overall"], verdict["unit"]) == ("COMPLETE", unit_of(database_url, "tx.committed"))
    assert query(database_url, "SELECT overall, due_at FROM contracts") == [("COMPLETE", None)]
    intact(database_url)


async def test_an_abort_judges_its_run_and_the_next_attempt_makes_it_good(database_url: str, world: World) -> None:
    """What was done and taken back is failed, like what was refused."""
    no = Remote(world, "no", after=["pay"], forward=then(refuses(), well))
    spine = over(database_url, Remote(world), no)
    async with running(spine):
        await failure(spine)
        (verdict,) = verdicts(database_url)
        assert (verdict["overall"], verdict["unit"]) == ("INCOMPLETE", unit_of(database_url, "tx.aborted"))
        assert failed(verdict) == ["no/complete_run", "/".join(FINALIZE), "pay/complete_run"]
        await complete(spine)
    assert [verdict["overall"] for verdict in verdicts(database_url)] == ["INCOMPLETE", "COMPLETE"]
    intact(database_url)


async def test_a_parked_completion_judges_its_run(database_url: str, world: World) -> None:
    """What could not be undone stands for now, and the run is not finalised."""
    stuck = Remote(world, rollback=raises(OSError("the bank is closed")))
    spine = over(database_url, stuck, Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(spine):
        await failure(spine)
    (verdict,) = verdicts(database_url)
    assert (verdict["overall"], verdict["unit"]) == ("INCOMPLETE", unit_of(database_url, "tx.parked"))
    assert failed(verdict) == ["no/complete_run", "/".join(FINALIZE)]
    intact(database_url)


async def test_an_operators_word_judges_the_run(sqlite_url: str, world: World) -> None:
    """The run is finalised under one key, and the one that was parked under another is undone by hand."""
    stuck = Remote(world, rollback=raises(OSError("the bank is closed")))
    plain = over(sqlite_url)
    spine = over(sqlite_url, stuck, Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(plain, spine):
        await plain.start_run("run-1", tenant_id="acme", expectations=[("pay", "complete_run", 600.0)])
        await complete(plain)
        error = await failure(spine, completion_key="again")
        assert [verdict["overall"] for verdict in verdicts(sqlite_url)] == ["INCOMPLETE", "COMPLETE"]
        await spine.resolve(str(error.transaction_id), evidence="a receipt", reason="bank down", actor="op")
    verdict = verdicts(sqlite_url)[-1]
    assert (verdict["overall"], verdict["unit"]) == ("INCOMPLETE", unit_of(sqlite_url, "tx.resolved"))
    assert failed(verdict) == ["pay/complete_run"]
    intact(sqlite_url)


async def test_what_acts_after_the_commit_is_judged_when_it_has(database_url: str, world: World) -> None:
    """Until then the run is pending, however it was committed; then it is complete, in the delivery's own commit."""
    held = Held()
    spine = over(database_url, Remote(world), Sender(world, post=held))
    async with running(spine):
        await complete(spine)
        await held.reached.wait()
        assert query(database_url, "SELECT overall FROM contracts") == [("PENDING",)]
        held.let_go.set()
        await until(lambda: query(database_url, "SELECT overall, due_at FROM contracts") == [("COMPLETE", None)])
    assert verdicts(database_url)[-1]["unit"] == unit_of(database_url, "event.published")
    intact(database_url)


async def test_without_the_rollback_audit_an_effect_counts_only_once_it_is_committed(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``RAC_ROLLBACK_AUDIT_ENABLED=false``: no success is told that nobody would take back."""
    monkeypatch.setattr("actors.attempts.RAC_ROLLBACK_AUDIT_ENABLED", False)
    no = Remote(world, "no", after=["pay"], forward=then(refuses(), well))
    spine = over(sqlite_url, Remote(world), no, publisher=Published())
    async with running(spine):
        await failure(spine)
        assert acks(sqlite_url) == [("no", "FAILED"), ("orchestrator", "FAILED")]
        assert "pay" not in [finding["domain"] for finding in verdicts(sqlite_url)[-1]["failed"]]
        assert "pay" in [finding["domain"] for finding in verdicts(sqlite_url)[-1]["pending"]]
        await complete(spine)
    told = [body for body in journal(sqlite_url, "ack") if (body["domain"], body["status"]) == ("pay", "SUCCESS")]
    assert [body["unit"] for body in told] == [unit_of(sqlite_url, "tx.committed")]
    assert transactions(sqlite_url) == ["ABORTED", "COMMITTED"]
    intact(sqlite_url)
