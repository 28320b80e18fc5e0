"""A run begins once, belongs to one tenant, and is out of every other tenant's reach."""

from __future__ import annotations

from functools import partial

import pytest

from spine import AuthorityDecision, TransactionFailed
from spine.governance.facade import CreatePolicyEvaluation
from tests.governed import intact, journal, running, together
from tests.integration.desk import Desk, sound

pytestmark = pytest.mark.anyio


async def test_a_run_starts_once_however_often_it_is_started(desk: Desk) -> None:
    """Again, and by many at once: each gets the decision it started with, one start is in the journal."""
    async with running(desk.spine):
        starts = [partial(desk.spine.start_run, "run-1", tenant_id="acme", agent_id=f"a{n}") for n in range(20)]
        decisions = await together(*starts)
        decisions.append(await desk.spine.start_run("run-1", tenant_id="acme"))
    assert all(decision == AuthorityDecision.allow() for decision in decisions)
    assert len(journal(desk.url, "run.started")) == 1


async def test_a_run_begins_once_when_many_calls_imply_it(database_url: str) -> None:
    """Twenty first calls of two processes on a run never started: one implicit start, all of them run."""
    here, there = Desk(database_url), Desk(database_url)
    async with running(here.spine, there.spine):
        results = await together(*[partial(desk.execute, run_id="run-1") for desk in (here, there)] * 10)
    assert all(sound(result).success for result in results)
    (started,) = journal(database_url, "run.started")
    assert started["implicit"] is True
    intact(database_url)


async def test_a_run_that_two_tenants_start_at_once_belongs_to_one(database_url: str) -> None:
    """From two processes: one tenant's starts are allowed, the other's are TENANT_MISMATCH, one start is recorded."""
    here, there = Desk(database_url), Desk(database_url)
    async with running(here.spine, there.spine):
        starts = [
            partial(desk.spine.start_run, "run-1", tenant_id=tenant) for tenant in ("a", "b") for desk in (here, there)
        ]
        decisions = await together(*starts * 3)
    (started,) = journal(database_url, "run.started")
    for number, decision in enumerate(decisions):
        tenant = "a" if number % 4 < 2 else "b"
        expected = "ALLOWED" if tenant == started["tenant_id"] else "TENANT_MISMATCH"
        assert decision.code == expected
    intact(database_url)


async def test_another_tenants_run_is_out_of_reach_and_its_story_stays_clean(sqlite_url: str) -> None:
    """TENANT_MISMATCH for operation, start, completion and report; the victim's ``why`` does not change by a letter."""
    desk = Desk(sqlite_url)
    spine = desk.spine
    async with running(spine):
        await spine.start_run("hers", tenant_id="victim")
        await desk.execute(tenant_id="victim", run_id="hers")
        before = (await spine.why("hers")).to_dict()
        entered = desk.entered

        result = sound(await desk.execute(run_id="hers"))
        assert result.error_code == "TENANT_MISMATCH"
        result = sound(await desk.execute(run_id="hers", idempotency_key="k"))
        assert result.error_code == "TENANT_MISMATCH"
        assert (await spine.start_run("hers", tenant_id="acme")).code == "TENANT_MISMATCH"
        with pytest.raises(TransactionFailed, match="another tenant") as failure:
            await spine.complete_run("hers", tenant_id="acme", run_status="succeeded")
        assert failure.value.code == "TENANT_MISMATCH"
        assert await spine.ask(CreatePolicyEvaluation("hers", "acme", "succeeded")) is None
        unknown = sound(await desk.execute("desk.steal", run_id="hers"))
        assert unknown.error_code in ("UNKNOWN_OPERATION", "TENANT_MISMATCH")

        assert (await spine.why("hers")).to_dict() == before
        assert desk.entered == entered
        done = await spine.complete_run("hers", tenant_id="victim", run_status="succeeded")
        assert done.is_complete
        assert (await desk.execute(run_id="his own", idempotency_key="k")).success
    mismatches = [b for b in journal(sqlite_url, "decision", "run.denied") if b["code"] == "TENANT_MISMATCH"]
    assert len(mismatches) >= 3
    for body in mismatches:
        assert (body["run_id"], body["claimed_run_id"], body["tenant_id"]) == (None, "hers", "acme")
    intact(sqlite_url)


async def test_a_refused_start_of_one_tenant_is_no_part_of_anothers_run(sqlite_url: str) -> None:
    """While new runs are refused anyone may have tried the id: whose run it becomes has only its own story."""
    desk = Desk(sqlite_url)
    spine = desk.spine
    async with running(spine):
        await spine.degrade(reason="an exercise", actor="ann")
        await spine.start_run("run-1", tenant_id="other")
        await desk.execute(run_id="run-1", tenant_id="other")
        await desk.execute("desk.steal", run_id="run-1", tenant_id="other")
        await spine.restore(reason="over", actor="ann")
        await spine.start_run("run-1", tenant_id="victim")
        await spine.complete_run("run-1", tenant_id="victim", run_status="failed", error_code="MINE")
        why = await spine.why("run-1")
    assert (why.tenant_id, why.verdict, why.cause.code) == ("victim", "failed", "MINE")
    assert why.decisions == []
