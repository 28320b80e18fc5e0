"""Completions that may not begin: refused before any effect, and on the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from actors import endings
from actors.dependencies import Dependencies
from actors.recorder import Recorder
from actors.records import text
from spine.effects import reversible
from spine.governance.params import id_problem
from spine.governance.transactions import (
    TRANSACTION_COORDINATOR_ENABLED,
    CompleteRun,
    CompletionConflict,
    DomainClass,
    RollbackNotSupportedError,
    TransactionFailed,
    TransactionPhase,
)
from spine.governance.units import Committed, Record, StorageFailed
from spine.kernel.messages import Envelope
from spine.parts import Part

Refusal = TransactionFailed | CompletionConflict | RollbackNotSupportedError


class ParkedSource(Protocol):
    """Where parked rollbacks are found."""

    async def parked(self, domain: str | None = None, limit: int = 1_000) -> Sequence[object]:
        """The steps whose rollback waits for an operator."""
        ...


class Refusals:
    """Says which completions may not begin, and records every one that is refused."""

    def __init__(self, deps: Dependencies, source: ParkedSource, parts: Sequence[Part], recorder: Recorder) -> None:
        self._deps = deps
        self._source = source
        self._parts = parts
        self._recorder = recorder

    async def of(self, request: CompleteRun) -> Refusal | None:
        """Why no completion may begin now, if so."""
        run = f"run {request.run_id!r} was not completed: "
        if not TRANSACTION_COORDINATOR_ENABLED:
            return TransactionFailed(
                f"{run}the transaction coordinator is switched off; unset TRANSACTION_COORDINATOR_ENABLED",
                TransactionPhase.NOT_STARTED,
                code="COORDINATOR_DISABLED",
            )
        for part in self._parts:
            if part.cls is DomainClass.EXTERNAL and not reversible(part.domain):
                return RollbackNotSupportedError(
                    f"{run}domain {part.name!r} has no rollback(effect), so a completion with it could end half done; "
                    "give it one, or make it a POST domain that acts after the commit"
                )
            if part.refuse_when_parked and await self._source.parked(part.name, 1):
                return TransactionFailed(
                    f"{run}a rollback of domain {part.name!r} is parked; see `spine parked` and resolve it first",
                    TransactionPhase.NOT_STARTED,
                    code="DOMAIN_PARKED",
                    failed_domain=part.name,
                )
        return None

    async def told(self, envelope: Envelope, request: CompleteRun, refusal: Refusal) -> Refusal:
        """The refusal, recorded."""
        await self.recorded(envelope, request, refusal)
        return refusal

    async def recorded(
        self, envelope: Envelope, request: CompleteRun, refusal: Refusal, start: Sequence[Record] = ()
    ) -> bool:
        """Record a refusal, with the ``start`` of a run that it is the first word of.

        ``False`` when somebody else started that run meanwhile. Raises ``TransactionFailed`` when the journal takes
        nothing.
        """
        sound = {
            name: value if id_problem(name, value) is None else None
            for name, value in (("run_id", request.run_id), ("tenant_id", request.tenant_id))
        }
        code, key = _code(refusal), request.completion_key
        # Another tenant's word is no part of the run's story, nor is one whose own tenant is not known.
        foreign = code == "TENANT_MISMATCH" or sound["tenant_id"] is None
        fields = {
            "run_id": None if foreign else sound["run_id"],
            "claimed_run_id": sound["run_id"] if foreign else None,
            "tenant_id": sound["tenant_id"],
            "completion_key": "" if key == "" or id_problem("completion_key", key) else key,
            "code": code,
            "reason": text(str(refusal)),
        }
        record = Record("tx.refused", self._deps.exchange.clock.time_us(), fields)
        outcome = await self._recorder.commit([*start, record], run_id=sound["run_id"], parent=envelope)
        if isinstance(outcome, StorageFailed):
            raise endings.unavailable(request, outcome.error, unknown=outcome.unknown)
        if not isinstance(outcome, Committed):
            return False
        if start:
            self._deps.runs.started(request.run_id, request.tenant_id)
        tracer = self._deps.exchange.tracer
        if tracer.decisions:
            facts = {name: fields[name] for name in ("tenant_id", "completion_key", "code", "reason")}
            tracer.decision("spine.transaction.refused", actor="coordinator", **tracer.identity(envelope), **facts)
        return True


def _code(refusal: Refusal) -> str:
    match refusal:
        case TransactionFailed():
            return refusal.code or "REFUSED"
        case CompletionConflict():
            return "COMPLETION_CONFLICT"
        case _:
            return "ROLLBACK_NOT_SUPPORTED"
