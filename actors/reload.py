"""A transaction read back from the journal: everything its next driver needs, from its records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from actors.completion import Part, Plan, Step, contract_step
from actors.rows import TransactionRow
from spine.explain.story import JournalRow
from spine.governance.transactions import CompleteRun, DomainClass, StepState, TxState
from spine.kernel.errors import JournalBroken

# Of what kinds the records are that are read here.
KINDS = ("tx.begun", "tx.step", "tx.aborting", "tx.claimed")
_FLAGS = ("governance_active", "authority_degraded", "authority_reason", "authority_code")


def reload(rows: Iterable[JournalRow], standing: TransactionRow, parts: Sequence[Part], instance: str) -> Plan:
    """The plan as the run's ``rows`` leave it. Raises JournalBroken when they do not tell of the transaction."""
    bodies = [row.body for row in rows if row.body.get("tx_id") == standing.tx_id]
    begun = next((body for body in bodies if body["kind"] == "tx.begun"), None)
    if begun is None:
        raise JournalBroken(f"transaction {standing.tx_id} has no beginning in the journal: run `spine verify`")
    plan = Plan(
        _request(begun),
        standing.tx_id,
        standing.attempt,
        standing.previous,
        standing.digest,
        {name: begun[name] for name in _FLAGS},
        begun["governance_epoch"],
        begun["at"],
        instance,
        _steps(begun, parts),
        standing.epoch,
        TxState(standing.state),
        tuple(begun["counts"]),
    )
    for body in bodies:
        if body["kind"] == "tx.step":
            _stepped(plan.steps[body["n"]], body)
        elif body["kind"] == "tx.claimed":
            # Who claims a transaction finds that somebody ended in the middle of it; each move of a step counts anew.
            for step in plan.steps:
                step.tried += step.state is StepState.RB_INTENT
        elif body["kind"] == "tx.aborting":
            named = (step for step in plan.steps if step.name == body["failed_domain"])
            plan.failed = next(named, None) or contract_step(plan)
            plan.code, plan.error = body["code"], body["error"]
            if not plan.failed.external:
                plan.failed.code, plan.failed.error = plan.code, plan.error
            if plan.failed.cls is DomainClass.LOCAL:
                # It had its turn: its part is undone and acknowledged as if nobody had died meanwhile.
                plan.failed.state = StepState.INTENT
    return plan


def _request(begun: Mapping[str, Any]) -> CompleteRun:
    return CompleteRun(
        run_id=begun["run_id"],
        tenant_id=begun["tenant_id"],
        run_status=begun["run_status"],
        agent_id=begun["agent_id"],
        error_code=begun["error_code"],
        error_message=begun["error_message"],
        trace_id=begun["trace_id"],
        is_synthetic=begun["is_synthetic"],
        synthetic_scenario_id=begun["synthetic_scenario_id"],
        skip_events=begun["skip_events"],
        completion_key=begun["completion_key"],
    )


def _steps(begun: Mapping[str, Any], parts: Sequence[Part]) -> list[Step]:
    known = {(part.name, part.cls): part.domain for part in parts}
    return [
        Step(
            entry["n"],
            entry["name"],
            DomainClass(entry["class"]),
            entry["action"],
            tuple(entry["after"]),
            entry["effect_id"],
            known.get((entry["name"], DomainClass(entry["class"]))),
        )
        for entry in begun["domains"]
    ]


def _stepped(step: Step, body: Mapping[str, Any]) -> None:
    step.state, step.tried = StepState(body["state"]), 0
    step.error, step.code = body["error"], body["code"]
    step.descriptor = body.get("descriptor", step.descriptor)
    step.result = body.get("result", step.result)
