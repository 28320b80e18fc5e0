"""What the registry writes down: pure functions from a call and its verdict to journal records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import orjson

from actors.calls import Call
from spine.governance.authority import ALLOW, AuthorityDecision, GovernanceState, RuleOutcome, Verdict, flat
from spine.governance.contract import START_TRACE, Expectation, first_due
from spine.governance.operations import OperationResult
from spine.governance.recordable import recordable
from spine.governance.units import Record

TEXT_MOST = 4000
OUTCOMES = ("allow", "degraded", "deny")


def text(value: str | None) -> str | None:
    """A text as it is stored: bounded, without what a database cannot take."""
    if value is None or (value.isascii() and len(value) <= TEXT_MOST and "\x00" not in value):
        return value
    if len(value) > TEXT_MOST:
        value = value[:TEXT_MOST] + "..."
    return value.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def decision_record(call: Call, verdict: Verdict, *, at: int, instance: str, eval_us: int) -> Record:
    """The decision on a call; ``final`` when no handler will run, so that no outcome follows."""
    decision = verdict.decision
    state = verdict.governance
    accepted, operation = call.accepted, call.operation
    would_have = verdict.would_have
    code, reason = text(decision.code), text(decision.reason)
    fields: dict[str, Any] = {
        "decision_id": call.decision_id,
        "run_id": call.run_id,
        "tenant_id": call.tenant_id,
        "operation": call.name,
        "instance": instance,
        "epoch": state.epoch,
        "allowed": decision.allowed,
        "degraded": decision.degraded,
        "code": code,
        "reason": reason,
        "conditions": [text(condition) for condition in decision.conditions] if decision.conditions else (),
        "rules": [_rule(outcome) for outcome in verdict.outcomes],
        "missing_inputs": call.missing,
        "effect": verdict.effect,
        "would_have": None
        if would_have is None
        else {"code": text(would_have.code), "reason": text(would_have.reason)},
        "params": {} if accepted is None or operation is None else accepted.audited(operation.audit_fields),
        "params_digest": None if accepted is None else accepted.digest,
        "masked": () if accepted is None else accepted.masked,
        "key": call.key,
        "parent": call.request.parent,
        "durability": "committed" if operation is None else operation.durability,
        "attempt": call.attempt,
        "queue_us": call.queue_us,
        "eval_us": eval_us,
        "final": not decision.allowed,
        "governance_active": state.active,
        "authority_degraded": decision.degraded,
        "authority_reason": reason,
        "authority_code": code,
    }
    if call.claimed_run_id is not None:
        fields["claimed_run_id"] = call.claimed_run_id
    return Record("decision", at, fields)


def _rule(outcome: RuleOutcome) -> Mapping[str, Any]:
    said, rule = outcome.said, outcome.rule
    if said is ALLOW and outcome.determined:
        return rule.allowed
    return {
        "id": rule.id,
        "version": rule.version,
        "mode": rule.mode,
        "outcome": "error" if outcome.raised else OUTCOMES[said.rank],
        "determined": outcome.determined,
        "reason": text(said.reason),
        "code": text(said.code),
    }


def outcome_record(call: Call, result: OperationResult, *, at: int, instance: str, handle_us: int) -> Record:
    """How the handler of an allowed call ended; its data only under an idempotency key, which must give it again."""
    assert call.verdict is not None
    fields: dict[str, Any] = {
        "decision_id": call.decision_id,
        "run_id": call.run_id,
        "tenant_id": call.tenant_id,
        "operation": call.name,
        "instance": instance,
        "success": result.success,
        "error": text(result.error),
        "error_code": text(result.error_code),
        "queue_us": call.queue_us,
        "handle_us": handle_us,
        "key": call.key,
        **flat_text(call.verdict.decision, call.verdict.governance),
    }
    if call.key is not None:
        fields["data"] = result.data
    return Record("outcome", at, fields)


def interrupted_record(open_decision: dict[str, Any], *, at: int, instance: str) -> Record:
    """The outcome of a decision whose process died before it recorded one."""
    fields = {
        name: open_decision.get(name)
        for name in (
            "decision_id",
            "run_id",
            "tenant_id",
            "operation",
            "key",
            "governance_active",
            "authority_degraded",
            "authority_reason",
            "authority_code",
        )
    }
    fields |= {
        "instance": instance,
        "success": False,
        "error": "the process that ran it ended before it recorded an outcome: what it did is not known",
        "error_code": "INTERRUPTED",
        "queue_us": open_decision.get("queue_us"),
        "handle_us": None,
    }
    if open_decision.get("key") is not None:
        fields["data"] = None
    return Record("outcome", at, fields)


def run_started(
    run_id: str,
    tenant_id: str,
    agent_id: str | None,
    decision: AuthorityDecision,
    state: GovernanceState,
    *,
    at: int,
    instance: str,
    implicit: bool,
    expectations: tuple[Expectation, ...],
    block_unmet: bool = False,
) -> list[Record]:
    """The start of a run with what it promises, and the acknowledgement that its trace began."""
    started = Record(
        "run.started",
        at,
        {
            "run_id": run_id,
            "tenant_id": tenant_id,
            "agent_id": agent_id,
            "implicit": implicit,
            "instance": instance,
            "epoch": state.epoch,
            "expectations": [expectation.to_dict() for expectation in expectations],
            "due_at": first_due(expectations, at),
            "block_unmet": block_unmet,
            "decision": decision.to_dict(),
            **flat_text(decision, state),
        },
    )
    return [started, ack(run_id, tenant_id, *START_TRACE, at=at, tx_id=None, result_id=run_id)]


def run_denied(
    run_id: str | None,
    tenant_id: str | None,
    agent_id: str | None,
    decision_id: str,
    decision: AuthorityDecision,
    state: GovernanceState,
    *,
    at: int,
    instance: str,
    claimed_run_id: str | None = None,
) -> Record:
    """A run that may not start."""
    fields: dict[str, Any] = {
        "run_id": run_id,
        "tenant_id": tenant_id,
        "agent_id": agent_id,
        "operation": "run.start",
        "decision_id": decision_id,
        "instance": instance,
        "epoch": state.epoch,
        **decision.to_dict(),
        "reason": text(decision.reason),
        "rules": [],
        "missing_inputs": [],
        **flat_text(decision, state),
    }
    if claimed_run_id is not None:
        fields["claimed_run_id"] = claimed_run_id
    return Record("run.denied", at, fields)


def ack(
    run_id: str,
    tenant_id: str,
    domain: str,
    action: str,
    *,
    at: int,
    tx_id: str | None,
    result_id: str | None = None,
    status: str = "SUCCESS",
    error: str | None = None,
) -> Record:
    """What a domain reports about a run."""
    return Record(
        "ack",
        at,
        {
            "run_id": run_id,
            "tenant_id": tenant_id,
            "tx_id": tx_id,
            "domain": domain,
            "action": action,
            "status": status,
            "result_id": result_id,
            "error": text(error),
        },
    )


def governance_changed(before: GovernanceState, after: GovernanceState, *, at: int) -> Record:
    """A switch of the governance state."""
    return Record(
        "governance.changed",
        at,
        {
            "from": before.mode.value,
            "to": after.mode.value,
            "epoch": after.epoch,
            "reason": text(after.reason),
            "actor": text(after.actor),
            "expires_at": after.expires_at,
        },
    )


def flat_text(decision: AuthorityDecision, state: GovernanceState) -> dict[str, Any]:
    """The four authority fields as stored."""
    fields = flat(decision, state)
    fields["authority_reason"] = text(decision.reason)
    fields["authority_code"] = text(decision.code)
    return fields


def storable(name: str, result: OperationResult, scrub: Callable[[str], str]) -> OperationResult:
    """The result of a keyed call, which must be given again from the record: its data as plain JSON, or a failure."""
    if not result.data:
        return result
    try:
        return replace(result, data=orjson.loads(scrub(recordable(result.data).decode())))
    except ValueError as problem:
        return OperationResult.fail(
            f"the handler of {name!r} ended, but its result {problem}: under an idempotency key it must be kept",
            "HANDLER_EXCEPTION:TypeError",
        )
