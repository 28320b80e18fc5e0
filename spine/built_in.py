"""The domains that take part in every completion: an incident, a policy evaluation and a trace, each a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from spine.domains import RunFacts
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.transactions import TransactionPhase


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a built-in domain's table, recorded in the journal and written from there."""

    table: str
    values: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The row's primary key."""
        return str(self.values["id"])

    def to_dict(self) -> dict[str, Any]:
        """The form in which a record holds it."""
        return {"table": self.table, "row": dict(self.values)}


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A participant of every completion that writes one row of its own table."""

    name: str
    action: str
    after: tuple[str, ...]
    phase: TransactionPhase
    build: Callable[[RunFacts], Row]

    def rows(self, run: RunFacts) -> tuple[Row, ...]:
        """The rows of this domain for the run, under the domain's effect id."""
        return (self.build(run),)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run status means for the incident and the policy evaluation that every completion leaves."""

    name: str
    severity: str
    incident: str
    policy: str
    reason: str


_SUCCESS: Final = Outcome("SUCCESS", "NONE", "CLOSED", "no_violation", "clean execution")
_FAILURE: Final = Outcome("FAILURE", "ERROR", "OPEN", "violation_incident", "execution failure")
_BLOCKED: Final = Outcome("BLOCKED", "WARNING", "OPEN", "advisory", "policy intervened")
_ABORTED: Final = Outcome("ABORTED", "INFO", "CLOSED", "not_applicable", "run aborted")
_UNKNOWN: Final = Outcome("UNKNOWN", "WARNING", "OPEN", "not_applicable", "status not known to the spine")

_OUTCOMES: Final = {
    **dict.fromkeys(("succeeded", "success", "completed", "ok"), _SUCCESS),
    **dict.fromkeys(("failed", "failure", "error", "timeout"), _FAILURE),
    **dict.fromkeys(("blocked", "denied", "halted", "refused"), _BLOCKED),
    **dict.fromkeys(("aborted", "cancelled", "canceled"), _ABORTED),
}


def outcome_of(run_status: str) -> Outcome:
    """What ``run_status`` means, whatever its case; a word nobody knows is UNKNOWN, never a success."""
    return _OUTCOMES.get(run_status.strip().lower(), _UNKNOWN)


def _detail(values: Mapping[str, Any]) -> str:
    """Canonical JSON. Raises ValueError on what JSON does not know and on text that is not Unicode."""
    try:
        return orjson.dumps(values, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError as error:
        raise ValueError(f"cannot be recorded as JSON: {error}") from error


def _refuse_nan(values: Mapping[str, Any]) -> None:
    """Raise ValueError on NaN and infinities, which orjson would write as null, and on nesting without end."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be recorded as JSON: {error}") from error


def _row(
    table: str,
    source: RunFacts | CreatePolicyEvaluation | EmitLesson,
    *,
    id: str,  # noqa: A002  the column's name
    run_id: str,
    kind: str,
    status: str,
    at: int,
    detail: Mapping[str, Any],
) -> Row:
    return Row(
        table,
        {
            "id": id,
            "run_id": run_id,
            "tenant_id": source.tenant_id,
            "kind": kind,
            "status": status,
            "detail": _detail(detail),
            "created_at": at,
            "is_synthetic": bool(source.is_synthetic),
            "synthetic_scenario_id": source.synthetic_scenario_id,
        },
    )


def incident_row(run: RunFacts) -> Row:
    """The incident of a completion: every run leaves one, a success a closed one without severity."""
    outcome = outcome_of(run.run_status)
    return _row(
        "incidents",
        run,
        id=run.effect_id,
        run_id=run.run_id,
        kind=f"EXECUTION_{outcome.name}",
        status=outcome.incident,
        at=run.completed_at,
        detail={
            "outcome": outcome.name,
            "severity": outcome.severity,
            "run_status": run.run_status,
            "agent_id": run.agent_id,
            "error_code": run.error_code,
            "error_message": run.error_message,
        },
    )


def policy_row(run: RunFacts) -> Row:
    """The policy evaluation of a completion, with what the run's operations met."""
    outcome = outcome_of(run.run_status)
    return _row(
        "policy_evaluations",
        run,
        id=run.effect_id,
        run_id=run.run_id,
        kind="run_completion",
        status=outcome.policy,
        at=run.completed_at,
        detail={
            "outcome": outcome.name,
            "reason": outcome.reason,
            "run_status": run.run_status,
            "operations": run.operations,
            "operations_denied": run.operations_denied,
            "operations_failed": run.operations_failed,
        },
    )


def trace_row(run: RunFacts) -> Row:
    """The closed trace of a run: the caller's trace id, if it gave one, and what the run amounted to."""
    return _row(
        "traces",
        run,
        id=run.effect_id,
        run_id=run.run_id,
        kind="run",
        status=outcome_of(run.run_status).name,
        at=run.completed_at,
        detail={
            "trace_id": run.trace_id,
            "run_status": run.run_status,
            "agent_id": run.agent_id,
            "operations": run.operations,
            "operations_denied": run.operations_denied,
            "operations_failed": run.operations_failed,
        },
    )


def policy_evaluation_row(request: CreatePolicyEvaluation, *, id: str, at: int) -> Row:  # noqa: A002
    """The row of an evaluation a worker reports; ``at`` in unix microseconds. Raises ValueError on bad numbers."""
    _refuse_nan({"policies_checked": request.policies_checked})
    outcome = outcome_of(request.run_status)
    return _row(
        "policy_evaluations",
        request,
        id=id,
        run_id=request.run_id,
        kind="worker",
        status=outcome.policy,
        at=at,
        detail={
            "outcome": outcome.name,
            "reason": outcome.reason,
            "run_status": request.run_status,
            "policies_checked": request.policies_checked,
        },
    )


def lesson_row(request: EmitLesson, *, id: str, at: int) -> Row:  # noqa: A002
    """The row of a lesson; ``at`` in unix microseconds. Raises ValueError when its detail is not JSON."""
    _refuse_nan(request.detail)
    return _row(
        "lessons",
        request,
        id=id,
        run_id=request.source_event_id,
        kind=request.lesson,
        status="OPEN",
        at=at,
        detail={**request.detail, "source_event_id": request.source_event_id},
    )


INCIDENTS: Final = BuiltIn("incidents", "create_incident", (), TransactionPhase.INCIDENT_CREATED, incident_row)
POLICIES: Final = BuiltIn("policies", "evaluate_policy", ("incidents",), TransactionPhase.POLICY_EVALUATED, policy_row)
TRACES: Final = BuiltIn("traces", "complete_trace", ("policies",), TransactionPhase.TRACE_COMPLETED, trace_row)
BUILT_INS: Final = (INCIDENTS, POLICIES, TRACES)
