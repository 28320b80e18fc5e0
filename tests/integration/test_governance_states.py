"""What each state of governance lets run, and how it marks what it let run."""

from __future__ import annotations

import pytest

from spine.governance.authority import GovernanceMode
from tests.governed import authority_fields, intact, journal, query, running
from tests.integration.governed_shop import OPS, buy, execute, shop


@pytest.mark.anyio
async def test_active_lets_everything_run_that_no_rule_denies(sqlite_url: str) -> None:
    """Calls outside runs, of a started run and of a new one; starts and completions."""
    spine = shop(sqlite_url)
    async with running(spine):
        assert (await spine.start_run("old", tenant_id="acme")).allowed
        for run_id in (None, "old", "new"):
            result = await execute(spine, run_id)
            assert result.success
            assert (result.metadata["governance_active"], result.metadata["authority_degraded"]) == (True, False)
            assert (await execute(spine, run_id, 11)).error_code == "LIMIT"
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert not done.flagged


@pytest.mark.anyio
async def test_bypassed_runs_what_a_rule_denies_and_tags_it(sqlite_url: str) -> None:
    """The kill switch: the rules are still asked and recorded, nothing they say binds, everything is tagged."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("old", tenant_id="acme")
        state = await spine.bypass(**OPS, for_s=60)
        assert (state.mode, state.epoch, state.active) == (GovernanceMode.BYPASSED, 2, False)
        for run_id in (None, "old", "new"):
            result = await execute(spine, run_id, 11)
            assert result.success
            assert result.decision is not None
            assert (result.decision.code, result.decision.conditions) == ("BYPASSED", ("governance_bypassed",))
            assert result.metadata["governance_active"] is False
        started = await spine.start_run("started under it", tenant_id="acme")
        assert (started.allowed, started.code) == (True, "BYPASSED")
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.metadata["governance_active"] is False
        assert done.flagged
    for body in journal(sqlite_url, "decision"):
        assert body["effect"] == "bypassed"
        assert body["governance_active"] is False
        assert body["would_have"] == {"code": "LIMIT", "reason": "too much"}
        assert [(rule["id"], rule["outcome"], rule["determined"]) for rule in body["rules"]] == [
            ("limit", "deny", False)
        ]
    intact(sqlite_url)


@pytest.mark.anyio
async def test_bypassed_bypasses_rules_and_nothing_else(sqlite_url: str) -> None:
    """Unknown operations, wrong params and another tenant's run are refused as ever."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("hers", tenant_id="other")
        await spine.bypass(**OPS)
        assert (await execute(spine, operation="shop.steal")).error_code == "UNKNOWN_OPERATION"
        assert (await execute(spine, "hers")).error_code == "TENANT_MISMATCH"
        wrong = await spine.execute(buy, tenant_id="acme", params={"amount": float("nan")})
        assert wrong.error_code == "INVALID_PARAMS"


@pytest.mark.anyio
async def test_degraded_refuses_new_runs_and_flags_existing_ones(sqlite_url: str) -> None:
    """A started run goes on and completes, flagged; a run that would begin now does not, whoever begins it."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("old", tenant_id="acme")
        await spine.degrade(**OPS)
        for run_id in ("old", None):
            result = await execute(spine, run_id)
            assert result.success
            assert (result.metadata["governance_active"], result.metadata["authority_degraded"]) == (True, True)
            assert (await execute(spine, run_id, 11)).error_code == "LIMIT"
        implicit = await execute(spine, "new")
        assert (implicit.success, implicit.error_code) == (False, "DEGRADED_NEW_RUN")
        explicit = await spine.start_run("new", tenant_id="acme")
        assert (explicit.allowed, explicit.code) == (False, "DEGRADED_NEW_RUN")
        assert "ann" in explicit.reason
        assert "an exercise" in explicit.reason
        assert (await spine.start_run("old", tenant_id="acme")).allowed
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert done.degraded
        assert (await spine.why("new")).verdict == "denied"
    assert query(sqlite_url, "SELECT run_id FROM runs") == [("old",)]
    (denied,) = journal(sqlite_url, "run.denied")
    assert denied["code"] == "DEGRADED_NEW_RUN"
    assert authority_fields(denied) == []


@pytest.mark.anyio
async def test_halted_runs_nothing_and_still_takes_completions(sqlite_url: str) -> None:
    """No operation runs, no run begins; what ran before may be completed, flagged."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("old", tenant_id="acme")
        await spine.halt(**OPS)
        for run_id in (None, "old", "new"):
            result = await execute(spine, run_id)
            assert (result.success, result.error_code) == (False, "HALTED")
            assert result.metadata["authority_code"] == "HALTED"
        assert (await spine.start_run("new", tenant_id="acme")).code == "HALTED"
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert done.degraded
    assert query(sqlite_url, "SELECT run_id FROM runs") == [("old",)]
    assert journal(sqlite_url, "outcome") == []


@pytest.mark.anyio
@pytest.mark.parametrize("state", ["degrade", "halt"])
async def test_the_completion_of_a_never_started_run_is_accepted_and_flagged(sqlite_url: str, state: str) -> None:
    """Completions are always accepted: the implied start is recorded as allowed and degraded, not as a denial."""
    spine = shop(sqlite_url)
    async with running(spine):
        await getattr(spine, state)(**OPS)
        done = await spine.complete_run("new", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert done.degraded
        why = await spine.why("new")
        assert (why.verdict, why.decisions) == ("succeeded", [])
        again = await spine.start_run("new", tenant_id="acme")
        assert (again.allowed, again.degraded) == (True, True)
    (started,) = journal(sqlite_url, "run.started")
    assert started["implicit"] is True
    assert (started["decision"]["allowed"], started["decision"]["degraded"]) == (True, True)
    assert started["authority_degraded"] is True
