"""What the log tells of transactions: every phase and every move of a step, under the message that caused it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.completion import Plan, Step
from spine.governance.transactions import TransactionResult
from spine.kernel.messages import Envelope
from spine.kernel.tracing import Tracer
from spine.publisher import Event


class TransactionLog:
    """Writes events with static names at the level of decisions; free when that is off."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begun(self, cause: Envelope | None, plan: Plan) -> None:
        """The transaction is in the journal."""
        self._write("spine.transaction.begun", cause, plan, attempt=plan.attempt, epoch=plan.epoch)

    def moved(self, cause: Envelope | None, plan: Plan, step: Step, move: str) -> None:
        """A step of a domain outside has moved."""
        self._write(
            "spine.transaction.step", cause, plan, domain=step.name, move=move, state=step.state.value, error=step.error
        )

    def ended(self, cause: Envelope | None, plan: Plan, result: TransactionResult) -> None:
        """The transaction is committed, aborted or parked: the event is named for it."""
        failed = plan.failed
        self._write(
            f"spine.transaction.{plan.state.value.lower()}",
            cause,
            plan,
            phase=result.phase.value,
            failed_domain=None if failed is None else failed.name,
            error=plan.error,
            **plan.flags,
        )

    def published(self, cause: Envelope | None, events: Sequence[Event]) -> None:
        """Its events are with the publisher."""
        tracer = self._tracer
        if tracer.decisions:
            first = events[0]
            identity = {"run_id": first.run_id} if cause is None else tracer.identity(cause)
            types = [event.type for event in events]
            tracer.decision(
                "spine.transaction.published", actor="coordinator", **identity, tx_id=first.tx_id, events=types
            )

    def _write(self, event: str, cause: Envelope | None, plan: Plan, **facts: Any) -> None:
        tracer = self._tracer
        if tracer.decisions:
            identity = {"run_id": plan.request.run_id} if cause is None else tracer.identity(cause)
            tracer.decision(event, actor="coordinator", **identity, tx_id=plan.tx_id, **facts)
