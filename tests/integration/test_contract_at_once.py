"""Reports of a run and its completion at the same moment: whichever is recorded last, the verdict knows of both."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors import reconciler
from spine import Settings, Spine
from spine.governance.contract import Overall
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import JournalBroken, JournalUnavailable
from tests.governed import intact, journal, query, running, until
from tests.participants import Remote, Sender, World, complete, failure, over, raises, refuses, then, transactions, well

# Nobody sweeps here: what is wrong in the record stays wrong.
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("unswept")]

# Later than everything that the standard set promises: that it is kept changes no moment.
MAIL = ("mail", "send", 7200.0)
LETTER = ("letter", "send", 7200.0)


async def start(spine: Spine, *expectations: tuple[str, str, float], **more: Any) -> None:
    assert (await spine.start_run("run-1", tenant_id="acme", expectations=expectations, **more)).allowed


async def report(spine: Spine, status: str = "SUCCESS", domain: str = "mail", **more: Any) -> None:
    await spine.acknowledge("run-1", tenant_id="acme", domain=domain, action="send", status=status, **more)


def overtake(spine: Spine, work: Callable[[], Awaitable[Any]], *, reading: int = 1) -> None:
    """Let ``work`` happen once this Spine has read a contract so many times, before it does anything with it."""
    reader: Any = spine._system.reader
    read = reader.contract_rows
    left = reading

    async def slowly(run_id: str) -> Any:
        nonlocal left
        left -= 1
        rows = await read(run_id)
        if left == 0:
            reader.contract_rows = read
            await work()
        return rows

    reader.contract_rows = slowly


def standing(url: str) -> list[tuple[Any, ...]]:
    return query(url, "SELECT overall, due_at FROM contracts")


async def test_a_report_that_the_completion_overtook_is_judged_with_it(database_url: str) -> None:
    """It was promised and is delivered, though the completion did not know of it: nothing is missing in the end."""
    here, there = Spine(database_url), Spine(database_url)
    async with running(here, there):
        await start(here, MAIL)
        overtake(here, lambda: complete(there))
        await report(here)
        assert standing(database_url) == [("COMPLETE", None)]
        assert (await here.reconcile("run-1")).overall is Overall.COMPLETE
    assert [body["overall"] for body in journal(database_url, "contract.reconciled")] == ["INCOMPLETE", "COMPLETE"]
    assert len([body for body in journal(database_url, "ack") if body["domain"] == "mail"]) == 1
    intact(database_url)


async def test_a_completion_that_a_report_overtook_is_judged_with_it(database_url: str) -> None:
    """The other way round."""
    here, there = Spine(database_url), Spine(database_url)
    async with running(here, there):
        await start(here, MAIL)
        overtake(here, lambda: report(there))
        await complete(here)
        assert standing(database_url) == [("COMPLETE", None)]
    assert len(journal(database_url, "tx.begun")) == 1
    intact(database_url)


async def test_a_report_that_takes_back_is_not_overlooked_by_one_that_delivers(database_url: str) -> None:
    """Each alone leaves the verdict as it is; together they decide it."""
    here, there = Spine(database_url), Spine(database_url)
    async with running(here, there):
        await start(here, MAIL, LETTER)
        await report(here, "FAILED", "letter", error="no stamps")
        await report(here)
        await complete(here)
        assert standing(database_url) == [("INCOMPLETE", None)]
        overtake(here, lambda: report(there, "ROLLED_BACK"))
        await report(here, domain="letter")
        assert standing(database_url) == [("INCOMPLETE", None)]
        found = await here.reconcile("run-1")
        assert [finding.domain for finding in found.failed] == ["mail"]
    intact(database_url)


async def test_who_asks_for_the_verdict_is_told_of_a_report_that_overtook_the_question(sqlite_url: str) -> None:
    """What is answered is what is recorded: with the report."""
    moments = VirtualClock(time.time_ns() // 1000)
    spine = Spine(sqlite_url, settings=Settings(clock=moments))
    async with running(spine):
        await start(spine, MAIL, ("letter", "send", 5.0))
        await moments.advance(6)
        overtake(spine, lambda: report(spine))
        found = await spine.reconcile("run-1")
        assert [finding.domain for finding in found.missing] == ["letter"]
        assert "mail" not in [finding.domain for finding in found.pending]
    intact(sqlite_url)


async def test_an_operator_is_not_held_up_by_a_report(database_url: str, world: World) -> None:
    """It comes between the operator's question and the record of its answer: nobody has moved the transaction."""
    stuck = Remote(world, rollback=raises(OSError("the bank is closed")))
    spine = over(database_url, stuck, Remote(world, "no", after=["pay"], forward=refuses()))
    async with running(spine):
        await start(spine, MAIL)
        error = await failure(spine)
        overtake(spine, lambda: report(spine))
        told = await spine.resolve(str(error.transaction_id), evidence="a receipt", reason="bank down", actor="op")
        assert told["state"] == "ABORTED_MANUAL"
    assert transactions(database_url) == ["ABORTED_MANUAL"]
    assert len(journal(database_url, "tx.resolved")) == 1
    intact(database_url)


# -- a run that commits only when everything promised is delivered


async def test_a_run_that_blocks_on_its_contract_commits_once_everything_is_delivered(
    database_url: str, world: World
) -> None:
    """Missing, then failed, then delivered: the error names what, what was done is undone, nothing is published."""
    spine = over(database_url, Remote(world), Sender(world, "post"))
    async with running(spine):
        await start(spine, MAIL, block_unmet=True)
        error = await failure(spine)
        assert (error.code, error.failed_domain, error.phase) == ("CONTRACT_UNMET", "contract", "ROLLED_BACK")
        assert "mail/send missing" in error.message
        assert world.told() == ["forward pay", "rollback pay"]
        assert journal(database_url, "event") == []
        await report(spine, "FAILED", error="it bounced")
        assert "mail/send failed: it bounced" in (await failure(spine)).message
        assert world.standing() == []
        await report(spine)
        assert (await complete(spine)).is_complete
    assert transactions(database_url) == ["ABORTED", "ABORTED", "COMMITTED"]
    intact(database_url)


async def test_a_run_of_local_domains_blocks_on_its_contract_too(database_url: str) -> None:
    """Nothing of the completion is written, and what the completion itself delivers is not asked for."""
    async with running(spine := Spine(database_url)):
        await start(spine, MAIL, block_unmet=True)
        error = await failure(spine)
        assert (error.code, error.failed_domain) == ("CONTRACT_UNMET", "contract")
        assert query(database_url, "SELECT count(*) FROM incidents") == [(0,)]
        assert (await spine.why("run-1")).verdict == "rolled_back"
        await report(spine)
        assert (await complete(spine)).is_complete
    assert transactions(database_url) == ["ABORTED", "COMMITTED"]
    intact(database_url)


@pytest.mark.parametrize("reading", [1, 2], ids=["before the commit point", "at the commit point"])
async def test_what_is_taken_back_while_the_domains_are_asked_still_blocks(
    sqlite_url: str, world: World, reading: int
) -> None:
    """Whenever before the commit; also where the verdict over the run is the same without it."""
    spine = over(sqlite_url, Remote(world, forward=then(refuses(), well)))
    async with running(spine):
        await start(spine, MAIL, block_unmet=True)
        assert (await failure(spine)).code == "NO_FUNDS"
        await report(spine)
        overtake(spine, lambda: report(spine, "ROLLED_BACK"), reading=reading)
        assert (await failure(spine)).code == "CONTRACT_UNMET"
    assert world.standing() == []
    assert transactions(sqlite_url) == ["ABORTED", "ABORTED"]
    intact(sqlite_url)


async def test_what_is_taken_back_while_a_local_completion_is_planned_still_blocks(sqlite_url: str) -> None:
    async with running(spine := Spine(sqlite_url)):
        await start(spine, MAIL, LETTER, block_unmet=True)
        await report(spine, domain="letter")
        assert (await failure(spine)).code == "CONTRACT_UNMET"
        await report(spine)
        overtake(spine, lambda: report(spine, "ROLLED_BACK", "letter"))
        assert (await failure(spine)).code == "CONTRACT_UNMET"
        await report(spine, domain="letter", result_id="the second one")
        assert (await complete(spine)).is_complete
    intact(sqlite_url)


async def test_a_contract_that_no_verdict_fits_is_told_as_damage(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row in the table was changed by hand: whoever judges it gives up, and the sweep goes on to other runs."""
    monkeypatch.setattr(reconciler, "SWEEP_S", 1.0)
    clock = VirtualClock(time.time_ns() // 1000)
    spine = Spine(sqlite_url, settings=Settings(clock=clock))
    async with running(spine):
        for run_id in ("run-1", "run-2"):
            await spine.start_run(run_id, tenant_id="acme", expectations=[("mail", "send", 5.0)])
        query(sqlite_url, "UPDATE contracts SET seq = seq + 1000 WHERE run_id = 'run-1'")
        await until(lambda: len(journal(sqlite_url, "contract.reconciled")) == 1, clock=clock)
        with pytest.raises(JournalBroken, match="contract of run 'run-1' does not stand where its journal rows say"):
            await spine.reconcile("run-1")
    assert [body["run_id"] for body in journal(sqlite_url, "contract.reconciled")] == ["run-2"]


async def test_a_completion_whose_contract_could_not_be_read_is_not_told_as_undone(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has begun and goes on: its caller hears that the end is not known, and finds it when asking again."""
    monkeypatch.setattr("actors.takeover.TICK_S", 0.02)
    spine = over(sqlite_url, Remote(world))
    async with running(spine):
        reader: Any = spine._system.reader
        read = reader.contract_rows

        async def fail_once(run_id: str) -> Any:
            if world.standing():
                reader.contract_rows = read
                raise JournalUnavailable("the database is locked")
            return await read(run_id)

        reader.contract_rows = fail_once
        error = await failure(spine)
        assert error.code == "JOURNAL_UNAVAILABLE"
        assert "it is not known whether run 'run-1' was completed" in str(error)
        assert (await complete(spine)).is_complete
    assert world.told() == ["forward pay"]
    assert transactions(sqlite_url) == ["COMMITTED"]
    intact(sqlite_url)
