"""How the end of an attempt is told: what was stored before, and the errors that name what stands and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from actors.completion import Plan
from actors.outbox import published
from actors.records import text
from actors.rows import TransactionRow
from spine.governance.completion import completion_payload
from spine.governance.transactions import (
    CompleteRun,
    CompletionConflict,
    StepState,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
    TxState,
)
from spine.kernel.errors import with_code
from spine.publisher import POST

# How much of a value is shown where two payloads differ.
SHOWN_MOST: Final = 200


def stored(result: TransactionResult, tx_id: str, rows: Sequence[Mapping[str, Any]]) -> TransactionResult:
    """A committed result as of now: with its events, once the run's ``rows`` tell that they are published."""
    ours = [body for body in rows if body.get("tx_id") == tx_id]
    done = published(ours)
    told = [body for body in ours if body["kind"] == "event" and not body["type"].startswith(POST)]
    if told and all(body["event_id"] in done for body in told):
        result.phase = TransactionPhase.EVENTS_PUBLISHED
        result.events_published = [body["type"] for body in told]
    return result


def invalid(request: CompleteRun, problems: Sequence[str]) -> TransactionFailed:
    """The error of a request whose fields cannot be recorded."""
    return TransactionFailed(
        f"run {request.run_id!r} was not completed: {'; '.join(problems)}",
        TransactionPhase.NOT_STARTED,
        code="INVALID_PARAMS",
    )


def foreign(request: CompleteRun) -> TransactionFailed:
    """The error of a completion by another tenant."""
    return TransactionFailed(
        f"run {request.run_id!r} belongs to another tenant, not to {request.tenant_id!r}",
        TransactionPhase.NOT_STARTED,
        code="TENANT_MISMATCH",
    )


def not_committed(request: CompleteRun, prior: TransactionRow, body: Mapping[str, Any]) -> TransactionFailed:
    """The error of a completion that was undone, or waits, parked, for an operator; ``body`` records that."""
    parked, why = prior.state == TxState.PARKED, f", {body.get('failed_domain')!r}: {body.get('error')}"
    return TransactionFailed(
        f"run {request.run_id!r}: transaction {prior.tx_id} is {prior.state}"
        f"{why if body.get('error') else ''}; see `spine why {request.run_id}`",
        TransactionPhase.PARKED if parked else TransactionPhase.ROLLED_BACK,
        body.get("result"),
        code=prior.state if parked else body.get("code", prior.state),
        failed_domain=body.get("failed_domain"),
        transaction_id=prior.tx_id,
    )


def in_flight(request: CompleteRun, prior: TransactionRow) -> TransactionFailed:
    """The error of a completion whose transaction outlives this Spine."""
    return TransactionFailed(
        f"run {request.run_id!r}: transaction {prior.tx_id} is {prior.state} and this Spine stops: it goes on with the "
        "next start, ask again then",
        TransactionPhase.FAILED,
        code="IN_FLIGHT",
        transaction_id=prior.tx_id,
    )


def failure(plan: Plan, result: TransactionResult) -> TransactionFailed:
    """The error of a completion that was rolled back or parked."""
    failed = plan.failed
    assert failed is not None
    why = f"domain {failed.name!r} ended transaction {plan.tx_id} with {with_code(plan.code, plan.error)}"
    if plan.state is TxState.PARKED:
        stuck = [step.name for step in plan.steps if step.state is StepState.PARKED]
        return TransactionFailed(
            f"run {plan.request.run_id!r} was not completed and is not undone: {why}; the rollback of "
            f"{', '.join(map(repr, stuck))} is parked, see `spine parked`",
            TransactionPhase.PARKED,
            result.to_dict(),
            plan.cause,
            code="PARKED",
            failed_domain=failed.name,
            transaction_id=plan.tx_id,
        )
    return TransactionFailed(
        f"run {plan.request.run_id!r} was not completed: {why}; nothing of it persists, complete the run again",
        TransactionPhase.ROLLED_BACK,
        result.to_dict(),
        plan.cause,
        code=plan.code,
        failed_domain=failed.name,
        transaction_id=plan.tx_id,
    )


def conflict(request: CompleteRun, prior: TransactionRow, digest: str, begun: Mapping[str, Any]) -> CompletionConflict:
    """The error of another payload under a key that is taken; ``begun`` is the record of the one that took it."""
    now = completion_payload(request) | {"error_message": text(request.error_message)}
    differing = [
        f"{name} {_shown(begun[name])}, now {_shown(value)}"
        for name, value in now.items()
        if name in begun and begun[name] != value
    ]
    return CompletionConflict(
        f"run {request.run_id!r} was completed under key {request.completion_key!r} with another payload"
        f"{': ' if differing else ''}{'; '.join(differing)} (digest {prior.digest[:16]}, now {digest[:16]}): "
        f"transaction {prior.tx_id} stands, use a new key"
    )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_MOST else f"{shown[:SHOWN_MOST]}..."


def unavailable(request: CompleteRun, detail: str, *, unknown: bool = False) -> TransactionFailed:
    """The error of a completion whose record is not taken, or of which it is ``unknown`` whether it was."""
    if unknown:
        message = (
            f"it is not known whether run {request.run_id!r} was completed: {detail}; complete the run again, what "
            "stands is told then"
        )
    else:
        message = (
            f"run {request.run_id!r} was not completed because the journal does not take the record: {detail}; free "
            "its storage and complete the run again"
        )
    return TransactionFailed(message, TransactionPhase.FAILED, code="JOURNAL_UNAVAILABLE")
