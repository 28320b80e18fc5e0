"""The participants of a run's completion: the built-in LOCAL domains, and what a user's own LOCAL ones look like."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, cast, runtime_checkable

import orjson

from spine.effects import External, Post, external_class
from spine.governance.contract import Expectation
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.params import id_problem
from spine.governance.transactions import DomainClass, TransactionPhase, plan_order
from spine.governance.units import Write
from spine.kernel.errors import ConfigurationError, SpineError, describe
from spine.kernel.ids import named

DEFAULT_ACTION: Final = "complete_run"
# What acknowledges for the run itself, and what stands for its contract where a domain would be named.
RESERVED: Final = ("orchestrator", "contract")


class Refused(SpineError):
    """A domain's business no: the whole completion is rolled back, with ``code`` and ``reason`` in the record."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        # A number or None given as code or reason must not fail later, where it is recorded.
        self.code = str(code)
        self.reason = str(reason)

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return (type(self), (self.code, self.reason))


def said_by(refusal: Refused) -> tuple[str, str]:
    """Code and reason of a refusal, even of a subclass of the user's that does not set them or cannot give them."""
    try:
        code, reason = getattr(refusal, "code", None), getattr(refusal, "reason", None)
        return str(code or "REFUSED"), str(reason or describe(refusal))
    except BaseException:  # noqa: BLE001  foreign code, like the domain that raised it: a refusal it is all the same
        return "REFUSED", describe(refusal)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a domain may know of the completion it takes part in.

    ``completed_at`` is in unix microseconds; ``effect_id`` is the id a domain gives to what it writes: the same each
    time the same transaction is planned. The counts are of the run's operations as recorded; ``results`` holds what the
    EXTERNAL domains before this one returned, by name.
    """

    run_id: str
    tenant_id: str
    run_status: str
    tx_id: str
    completed_at: int
    effect_id: str = ""
    agent_id: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    trace_id: str | None = None
    is_synthetic: bool = False
    synthetic_scenario_id: str | None = None
    completion_key: str = ""
    operations: int = 0
    operations_denied: int = 0
    operations_failed: int = 0
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def seen_by(self, domain: str) -> RunFacts:
        """The same facts with the ``effect_id`` of ``domain``. Raises ValueError when ``tx_id`` is not a UUID."""
        return replace(self, effect_id=effect_id(self.tx_id, domain))

    def descriptor(self) -> dict[str, Any]:
        """What an effect is described by when its domain does not say it better."""
        return {
            name: getattr(self, name)
            for name in (
                "run_status", "agent_id", "error_code", "error_message", "trace_id", "is_synthetic",
                "synthetic_scenario_id", "completion_key", "completed_at", "operations", "operations_denied",
                "operations_failed",
            )
        }  # fmt: skip


def effect_id(tx_id: str, domain: str) -> str:
    """The id of what ``domain`` does in transaction ``tx_id``. Raises ValueError when ``tx_id`` is not a UUID."""
    return named(tx_id, [domain])[0]


@runtime_checkable
class Local(Protocol):
    """A participant whose writes join the completion's own commit.

    ``plan`` returns the writes; it may raise ``Refused``. It is called in the coordinator's task, so it must not block.
    An ``action`` attribute names what is acknowledged (default ``complete_run``).
    """

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str]: ...

    def plan(self, run: RunFacts) -> Sequence[Write]: ...


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

Participant = BuiltIn | Local | External | Post


def action_of(domain: Participant) -> str:
    """What the domain acknowledges."""
    return str(getattr(domain, "action", DEFAULT_ACTION))


def promise_of(domain: Participant) -> Expectation:
    """What a run promises of the domain: a POST one may keep it after the run is finalised."""
    return Expectation(domain.name, action_of(domain), after_commit=class_of(domain) is DomainClass.POST)


def class_of(domain: object) -> DomainClass:
    """How ``domain`` takes part. Raises ConfigurationError naming it when it cannot."""
    name = getattr(domain, "name", None)
    label = f"domain {name!r}" if isinstance(name, str) else f"domain {domain!r}"
    if not isinstance(name, str) or not name.strip():
        raise ConfigurationError(f"{label} has no name: give it a non-empty `name`")
    for field_name, value in (("name", name), ("action", getattr(domain, "action", DEFAULT_ACTION))):
        if problem := id_problem(field_name, value):
            raise ConfigurationError(f"{label}: {problem}")
    if name in RESERVED:
        raise ConfigurationError(f"{label}: the name is Spine's own; take another one than {', '.join(RESERVED)}")
    after = getattr(domain, "after", None)
    if isinstance(after, str) or not isinstance(after, Iterable) or not all(isinstance(a, str) for a in after):
        raise ConfigurationError(f"{label}: `after` must be a tuple of domain names, () for none; found {after!r}")
    if isinstance(domain, type):
        raise ConfigurationError(f"{label} is the class {domain.__qualname__}: pass an instance of it")
    if inspect.iscoroutinefunction(getattr(domain, "plan", None)):
        raise ConfigurationError(
            f"{label}: plan(run) is async, but a plan is made without waiting: make it a plain def"
        )
    outside = external_class(domain, label)
    if outside is not None:
        return outside
    if isinstance(domain, BuiltIn) or callable(getattr(domain, "plan", None)):
        return DomainClass.LOCAL
    raise ConfigurationError(
        f"{label} ({type(domain).__name__}) cannot take part in a completion: it has neither plan(run) that returns "
        "writes (LOCAL), nor async forward(effect) and rollback(effect) (EXTERNAL), nor async post(effect) (POST)"
    )


def participants(domains: Sequence[object]) -> tuple[Participant, ...]:
    """The built-in domains and ``domains`` in the order in which they take part.

    Raises ConfigurationError naming a domain that cannot take part, is declared twice, or waits in a circle.
    """
    for domain in domains:
        class_of(domain)
    return plan_order([*BUILT_INS, *cast("Sequence[Participant]", domains)])
