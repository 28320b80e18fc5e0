"""What the coordinator writes down of a transaction: pure functions from its plan to journal records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.completion import Plan, Step
from actors.records import ack, text
from spine.governance.contract import FINALIZE, AckStatus
from spine.governance.transactions import (
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
    step_move,
)
from spine.governance.units import Record
from spine.kernel.ids import named
from spine.publisher import POST, Event


def identity(plan: Plan) -> dict[str, Any]:
    """Which transaction a record is of, and the fencing token it is written under."""
    return {
        "tx_id": plan.tx_id,
        "run_id": plan.request.run_id,
        "tenant_id": plan.request.tenant_id,
        "epoch": plan.epoch,
    }


def begun(plan: Plan) -> Record:
    """The transaction with everything that is needed to go on with it."""
    request = plan.request
    return Record(
        "tx.begun",
        plan.at,
        {
            **identity(plan),
            "agent_id": request.agent_id,
            "completion_key": request.completion_key,
            "digest": plan.digest,
            "attempt": plan.attempt,
            "previous": plan.previous,
            "run_status": request.run_status,
            "error_code": request.error_code,
            "error_message": text(request.error_message),
            "domains": [
                {
                    "n": step.n,
                    "name": step.name,
                    "class": step.cls.value,
                    "action": step.action,
                    "after": step.after,
                    "effect_id": step.effect_id,
                }
                for step in plan.steps
            ],
            "counts": plan.counts,
            "governance_epoch": plan.governance_epoch,
            "instance": plan.instance,
            "rollback_audit": plan.rollback_audit,
            "trace_id": request.trace_id,
            "is_synthetic": request.is_synthetic,
            "synthetic_scenario_id": request.synthetic_scenario_id,
            "skip_events": request.skip_events,
            **plan.flags,
        },
    )


def moved(plan: Plan, step: Step, move: str, at: int, **more: Any) -> Record:
    """Make an EXTERNAL step's move, which the table must allow, and give its record."""
    step.state = move_step(step.state, step_move(move).target, plan.state)
    return step_record(plan, step, move, at, **more)


def step_record(plan: Plan, step: Step, move: str, at: int, **more: Any) -> Record:
    """The record of a move that an EXTERNAL step has made."""
    return Record(
        "tx.step",
        at,
        {**identity(plan), **_standing(step), "move": move, **more},
    )


def _standing(step: Step) -> dict[str, Any]:
    return {
        "n": step.n,
        "domain": step.name,
        "class": step.cls.value,
        "state": step.state.value,
        "effect_id": step.effect_id,
        "result_id": step.result_id,
        "error": step.error,
        "code": step.code,
    }


def _local_steps(plan: Plan, at: int) -> list[Record]:
    """The final records of the LOCAL steps; their rows only where they are to be written."""
    return [
        Record(
            "tx.step",
            at,
            {
                **identity(plan),
                **_standing(step),
                "rows": [row.to_dict() for row in step.rows] if step.state is StepState.DONE else [],
            },
        )
        for step in plan.steps
        if step.cls is DomainClass.LOCAL
    ]


def committed(plan: Plan, at: int) -> tuple[list[Record], list[Event], TransactionResult]:
    """The records of the commit, its events, and the result."""
    plan.state = move_tx(plan.state, TxState.COMMITTED, [step.state for step in plan.before_commit()])
    result = result_of(plan, TransactionPhase.COMMITTED)
    events = _events(plan)
    rows = _local_steps(plan, at)
    rows += [delivered(plan, step, at) for step in plan.before_commit() if not acknowledged_at_once(plan, step)]
    rows += [_event(plan, event, at) for event in events]
    rows.append(
        Record(
            "tx.committed",
            at,
            {
                **identity(plan),
                "run_status": plan.request.run_status,
                "phase": TransactionPhase.COMMITTED.value,
                "result": result.to_dict(),
            },
        )
    )
    rows.append(_ack(plan, *FINALIZE, at, AckStatus.SUCCESS, plan.tx_id))
    return rows, events, result


def aborting(plan: Plan, at: int) -> list[Record]:
    """The decision to abort, and what the domain that caused it reports."""
    failed = plan.failed
    assert failed is not None
    plan.state = move_tx(plan.state, TxState.COMPENSATING, [])
    decision = Record(
        "tx.aborting",
        at,
        {
            **identity(plan),
            "phase": _reached(plan).value,
            "failed_domain": failed.name,
            "code": plan.code,
            "error": plan.error,
            "interrupted": plan.interrupted,
        },
    )
    if failed not in plan.steps:
        return [decision]
    return [decision, _ack(plan, failed.name, failed.action, at, AckStatus.FAILED, None, plan.error)]


def rolled_back(plan: Plan, step: Step, at: int, *, reason: str, attempts: int) -> list[Record]:
    """A step that is undone, with its acknowledgement."""
    record = moved(plan, step, "undone", at, attempts=attempts)
    return [record, *_rolled_back_ack(plan, step, at, reason)]


def aborted(plan: Plan, at: int) -> tuple[list[Record], TransactionResult]:
    """The end of a completion of which nothing persists."""
    rows: list[Record] = []
    for step in plan.steps:
        if step.cls is DomainClass.LOCAL and step.state is StepState.DONE:
            step.state = StepState.PLANNED
        elif step.cls is DomainClass.LOCAL and step.state is not StepState.PLANNED:
            step.state = move_step(step.state, StepState.RB_INTENT, plan.state)
            step.state = move_step(step.state, StepState.ROLLED_BACK, plan.state)
            rows += _rolled_back_ack(plan, step, at, "nothing of it was written")
    rows = [*_local_steps(plan, at), *rows]
    failed, reached = plan.failed, _reached(plan)
    plan.state = move_tx(plan.state, TxState.ABORTED, [step.state for step in plan.before_commit()])
    result = result_of(plan, TransactionPhase.ROLLED_BACK)
    assert failed is not None
    rows.append(
        Record(
            "tx.aborted",
            at,
            {
                **identity(plan),
                "state": plan.state.value,
                "phase": reached.value,
                "failed_domain": failed.name,
                "code": plan.code,
                "error": plan.error,
                "interrupted": plan.interrupted,
                "result": result.to_dict(),
            },
        )
    )
    rows.append(_ack(plan, *FINALIZE, at, AckStatus.FAILED, plan.tx_id, plan.error))
    return rows, result


def parked(plan: Plan, at: int) -> tuple[list[Record], TransactionResult]:
    """A completion that waits for an operator because a rollback failed."""
    stuck = [step for step in plan.steps if step.state is StepState.PARKED]
    # What a LOCAL domain planned was never written: it neither parks nor holds anything up.
    plan.state = move_tx(plan.state, TxState.PARKED, [step.state for step in plan.steps if step.external])
    result = result_of(plan, TransactionPhase.PARKED)
    fields = {
        **identity(plan),
        "state": plan.state.value,
        "phase": TransactionPhase.PARKED.value,
        "parked_domains": [step.name for step in stuck],
        "failed_domain": stuck[0].name,
        "code": stuck[0].code,
        "error": stuck[0].error,
        "result": result.to_dict(),
    }
    return [
        Record("tx.parked", at, fields),
        _ack(plan, *FINALIZE, at, AckStatus.FAILED, plan.tx_id, stuck[0].error),
    ], result


def resolved(plan: Plan, at: int, *, evidence: str, reason: str, actor: str) -> list[Record]:
    """An operator's word that a parked transaction was undone by hand."""
    open_steps = [step for step in plan.steps if step.external and step.state is not StepState.PLANNED]
    acks = [
        taken_back
        for step in open_steps
        if step.state is not StepState.ROLLED_BACK
        for taken_back in _rolled_back_ack(plan, step, at, f"by hand, says {actor}: {evidence}")
    ]
    plan.state = move_tx(plan.state, TxState.ABORTED_MANUAL, [step.state for step in plan.before_commit()])
    fields = {
        **identity(plan),
        "state": plan.state.value,
        "evidence": text(evidence),
        "reason": text(reason),
        "actor": text(actor),
    }
    return [Record("tx.resolved", at, fields), *acks]


def acknowledged_at_once(plan: Plan, step: Step) -> bool:
    """Whether what a step did is acknowledged before the commit: only where its undoing would be acknowledged too."""
    return step.external and plan.rollback_audit


def delivered(plan: Plan, step: Step, at: int) -> Record:
    """The acknowledgement of what the step's domain did."""
    return _ack(plan, step.name, step.action, at, AckStatus.SUCCESS, step.result_id)


def _rolled_back_ack(plan: Plan, step: Step, at: int, reason: str) -> list[Record]:
    if not plan.rollback_audit:
        return []
    found = _ack(
        plan,
        step.name,
        step.action,
        at,
        AckStatus.ROLLED_BACK,
        step.result_id or step.effect_id,
        step.hiccup or step.error,
    )
    found.fields["reason"] = text(reason)
    return [found]


def _ack(
    plan: Plan,
    domain: str,
    action: str,
    at: int,
    status: AckStatus,
    result_id: str | None,
    error: str | None = None,
) -> Record:
    request = plan.request
    return ack(
        request.run_id,
        request.tenant_id,
        domain,
        action,
        at=at,
        tx_id=plan.tx_id,
        result_id=result_id,
        status=status.value,
        error=error,
    )


def _reached(plan: Plan) -> TransactionPhase:
    assert plan.failed is not None
    return phase_reached(step.name for step in plan.steps[: plan.failed.n])


def _events(plan: Plan) -> list[Event]:
    """What is handed to the outbox: the run's event, and the domains that act after the commit."""
    request = plan.request
    completed = {
        "run_status": request.run_status,
        "agent_id": request.agent_id,
        "error_code": request.error_code,
        "trace_id": request.trace_id,
        "is_synthetic": request.is_synthetic,
        "completed_at": plan.at,
        **plan.flags,
    }
    told: list[tuple[str, Mapping[str, Any], str | None]] = []
    if not request.skip_events:
        told.append(("run.completed", completed, None))
    told += [
        (f"{POST}{step.name}", {"action": step.action, "descriptor": step.descriptor}, step.effect_id)
        for step in plan.steps
        if step.cls is DomainClass.POST
    ]
    return [
        Event(
            effect or named(plan.tx_id, [f"event:{n}"])[0],
            plan.tx_id,
            request.run_id,
            request.tenant_id,
            n,
            kind,
            payload,
            plan.instance,
            plan.epoch,
        )
        for n, (kind, payload, effect) in enumerate(told)
    ]


def _event(plan: Plan, event: Event, at: int) -> Record:
    return Record(
        "event",
        at,
        {
            **identity(plan),
            "event_id": event.event_id,
            "n": event.n,
            "type": event.type,
            "instance": event.instance,
            "payload": dict(event.payload),
        },
    )


def _domain_result(plan: Plan, step: Step) -> DomainResult:
    return DomainResult(
        step.name,
        step.action,
        step.result_id,
        step.state is StepState.DONE and plan.failed is None,
        step.error,
        moment(plan.at),
        step.code,
        step.state.value,
        step.cls.value,
    )


def result_of(plan: Plan, phase: TransactionPhase) -> TransactionResult:
    """The result as far as the plan has come."""
    request = plan.request
    return TransactionResult.of(
        request.run_id,
        [_domain_result(plan, step) for step in plan.before_commit()],
        phase=phase,
        transaction_id=plan.tx_id,
        tenant_id=request.tenant_id,
        run_status=request.run_status,
        duration_ms=plan.duration_ms,
        metadata=plan.flags,
    )
