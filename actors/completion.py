"""A completion as data: planned by its domains, turned into the records of a commit or of an abort; pure."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from actors.records import ack, flat_text, text
from spine.domains import BuiltIn, Participant, Refused, Row, RunFacts, action_of, effect_id
from spine.explain.story import JournalRow
from spine.governance.authority import AuthorityDecision, GovernanceState, flat
from spine.governance.contract import FINALIZE
from spine.governance.transactions import (
    CompleteRun,
    DomainClass,
    DomainResult,
    StepState,
    TransactionPhase,
    TransactionResult,
    TxState,
    moment,
    move_step,
    move_tx,
    phase_reached,
)
from spine.governance.units import Record, Write
from spine.kernel.errors import describe
from spine.publisher import Event


@dataclass(slots=True)
class Step:
    """One domain's part of the transaction."""

    n: int
    domain: Participant
    effect_id: str
    state: StepState = StepState.PLANNED
    rows: tuple[Row, ...] = ()
    writes: tuple[Write, ...] = ()
    code: str | None = None
    error: str | None = None

    @property
    def result_id(self) -> str | None:
        """The id of what the domain wrote."""
        return self.effect_id if self.state is StepState.DONE else None


@dataclass(slots=True)
class Plan:
    """A transaction before it is written; ``failed`` is the step that refused or raised."""

    request: CompleteRun
    tx_id: str
    attempt: int
    previous: str | None
    digest: str
    decision: AuthorityDecision
    governance: GovernanceState
    at: int
    instance: str
    steps: list[Step]
    failed: Step | None = None
    cause: BaseException | None = None
    duration_ms: int = 0
    start: list[Record] = field(default_factory=list)
    rows: Sequence[JournalRow] = ()

    @property
    def writes(self) -> list[Write]:
        """Every statement of the users' domains, in order."""
        return [write for step in self.steps for write in step.writes]


def carry_out(plan: Plan, facts: RunFacts) -> None:
    """Ask every domain for its part, in order, until one refuses or raises."""
    for step in plan.steps:
        step.state = move_step(step.state, StepState.INTENT, TxState.EXECUTING)
        try:
            _ask(step, facts.seen_by(step.domain.name))
        except Refused as refusal:
            fail(plan, step, StepState.REFUSED, str(refusal.code), str(refusal.reason), refusal)
            return
        except BaseException as error:  # noqa: BLE001  a domain is foreign code: its failure rolls the completion back
            fail(plan, step, StepState.UNKNOWN, type(error).__name__, describe(error), error)
            return
        step.state = move_step(step.state, StepState.DONE, TxState.EXECUTING)


def fail(plan: Plan, step: Step, state: StepState, code: str, error: str, cause: BaseException | None) -> None:
    """Mark the step that failed; what the others planned was never written."""
    if step.state is StepState.INTENT:
        step.state = move_step(step.state, state, TxState.EXECUTING)
    step.code, step.error = text(code), text(error)
    plan.failed, plan.cause = step, cause


def _ask(step: Step, facts: RunFacts) -> None:
    domain = step.domain
    if isinstance(domain, BuiltIn):
        step.rows = domain.rows(facts)
        return
    planned: object = domain.plan(facts)
    if inspect.iscoroutine(planned):
        planned.close()
    if not isinstance(planned, Sequence):
        raise TypeError(f"domain {domain.name!r} planned {type(planned).__name__}: plan(run) must return Write objects")
    writes = tuple(planned)
    for write in writes:
        if not isinstance(write, Write):
            raise TypeError(
                f"domain {domain.name!r} planned {type(write).__name__}: plan(run) must return Write objects"
            )
    step.writes = writes


def steps_of(participants: Sequence[Participant], tx_id: str) -> list[Step]:
    """The steps of a new transaction."""
    return [Step(n, domain, effect_id(tx_id, domain.name)) for n, domain in enumerate(participants)]


def committed(plan: Plan) -> tuple[list[Record], list[Event], TransactionResult]:
    """The records of the commit, its events, and the result."""
    move_tx(TxState.EXECUTING, TxState.COMMITTED, [step.state for step in plan.steps])
    request = plan.request
    result = _result(plan, TransactionPhase.COMMITTED)
    events = [] if request.skip_events else [_completed_event(plan)]
    rows = [*plan.start, _begun(plan)]
    rows += [_step(plan, step) for step in plan.steps]
    rows += [_ack(plan, step.domain.name, action_of(step.domain), "SUCCESS", step.result_id) for step in plan.steps]
    rows += [_event(plan, event) for event in events]
    rows.append(
        Record(
            "tx.committed",
            plan.at,
            {
                **_identity(plan),
                "run_status": request.run_status,
                "phase": TransactionPhase.COMMITTED.value,
                "result": result.to_dict(),
            },
        )
    )
    rows.append(_ack(plan, *FINALIZE, "SUCCESS", plan.tx_id))
    return rows, events, result


def aborted(plan: Plan) -> tuple[list[Record], TransactionResult]:
    """The records of a completion that one domain ended; nothing else of it is written."""
    failed = plan.failed
    assert failed is not None
    reached = phase_reached(step.domain.name for step in plan.steps[: failed.n])
    results = [_domain_result(plan, step) for step in plan.steps]
    state = move_tx(TxState.EXECUTING, TxState.COMPENSATING, [step.state for step in plan.steps])
    for step in plan.steps:
        if step.state is StepState.DONE:
            step.state = StepState.PLANNED
        elif step.state is not StepState.PLANNED:
            step.state = move_step(step.state, StepState.RB_INTENT, state)
            step.state = move_step(step.state, StepState.ROLLED_BACK, state)
    state = move_tx(state, TxState.ABORTED, [step.state for step in plan.steps])
    result = _result(plan, TransactionPhase.ROLLED_BACK, results)
    rows = [*plan.start, _begun(plan)]
    rows += [_step(plan, step) for step in plan.steps]
    rows.append(_ack(plan, failed.domain.name, action_of(failed.domain), "FAILED", None, failed.error))
    rows.append(
        Record(
            "tx.aborted",
            plan.at,
            {
                **_identity(plan),
                "state": state.value,
                "phase": reached.value,
                "failed_domain": failed.domain.name,
                "code": failed.code,
                "error": failed.error,
                "result": result.to_dict(),
            },
        )
    )
    rows.append(_ack(plan, *FINALIZE, "FAILED", plan.tx_id, failed.error))
    return rows, result


def _identity(plan: Plan) -> dict[str, Any]:
    return {"tx_id": plan.tx_id, "run_id": plan.request.run_id, "tenant_id": plan.request.tenant_id}


def _begun(plan: Plan) -> Record:
    request = plan.request
    return Record(
        "tx.begun",
        plan.at,
        {
            **_identity(plan),
            "agent_id": request.agent_id,
            "completion_key": request.completion_key,
            "digest": plan.digest,
            "attempt": plan.attempt,
            "previous": plan.previous,
            "run_status": request.run_status,
            "error_code": request.error_code,
            "error_message": text(request.error_message),
            "domains": [
                {"n": step.n, "name": step.domain.name, "class": DomainClass.LOCAL.value} for step in plan.steps
            ],
            "epoch": plan.governance.epoch,
            "instance": plan.instance,
            "trace_id": request.trace_id,
            "is_synthetic": request.is_synthetic,
            "synthetic_scenario_id": request.synthetic_scenario_id,
            **flat_text(plan.decision, plan.governance),
        },
    )


def _step(plan: Plan, step: Step) -> Record:
    written = step.state is StepState.DONE
    return Record(
        "tx.step",
        plan.at,
        {
            **_identity(plan),
            "n": step.n,
            "domain": step.domain.name,
            "class": DomainClass.LOCAL.value,
            "state": step.state.value,
            "effect_id": step.effect_id,
            "result_id": step.result_id,
            "error": step.error,
            "code": step.code,
            "rows": [row.to_dict() for row in step.rows] if written else [],
        },
    )


def _ack(plan: Plan, domain: str, action: str, status: str, result_id: str | None, error: str | None = None) -> Record:
    request = plan.request
    return ack(
        request.run_id,
        request.tenant_id,
        domain,
        action,
        at=plan.at,
        tx_id=plan.tx_id,
        result_id=result_id,
        status=status,
        error=error,
    )


def _completed_event(plan: Plan) -> Event:
    request = plan.request
    payload = {
        "run_status": request.run_status,
        "agent_id": request.agent_id,
        "error_code": request.error_code,
        "trace_id": request.trace_id,
        "is_synthetic": request.is_synthetic,
        "completed_at": plan.at,
        **flat(plan.decision, plan.governance),
    }
    event_id = str(uuid5(UUID(plan.tx_id), "event:0"))
    return Event(event_id, plan.tx_id, request.run_id, request.tenant_id, 0, "run.completed", payload, plan.instance)


def _event(plan: Plan, event: Event) -> Record:
    return Record(
        "event",
        plan.at,
        {
            **_identity(plan),
            "event_id": event.event_id,
            "n": event.n,
            "type": event.type,
            "instance": event.instance,
            "payload": dict(event.payload),
        },
    )


def _domain_result(plan: Plan, step: Step) -> DomainResult:
    return DomainResult(
        step.domain.name,
        action_of(step.domain),
        step.result_id,
        step.state is StepState.DONE and plan.failed is None,
        step.error,
        moment(plan.at),
        step.code,
        step.state.value,
    )


def _result(plan: Plan, phase: TransactionPhase, domains: Sequence[DomainResult] | None = None) -> TransactionResult:
    request = plan.request
    return TransactionResult.of(
        request.run_id,
        domains or [_domain_result(plan, step) for step in plan.steps],
        phase=phase,
        transaction_id=plan.tx_id,
        tenant_id=request.tenant_id,
        run_status=request.run_status,
        duration_ms=plan.duration_ms,
        metadata=flat_text(plan.decision, plan.governance),
    )
