"""Attempts to complete a run: a request is answered by what an earlier attempt left, or by one of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, assert_never

from actors import completion, endings
from actors import transaction_records as records
from actors.completion import Part, Plan
from actors.conduct import UNWRITABLE
from actors.dependencies import Dependencies
from actors.endings import TransactionRow
from actors.outbox import Outbox
from actors.records import flat_text, text
from actors.saga import Driving, Lost, Saga
from actors.starts import implicit_start
from spine.effects import reversible
from spine.governance.authority import check_start
from spine.governance.failpoints import BEGIN, of_tx
from spine.governance.transactions import (
    TRANSACTION_COORDINATOR_ENABLED,
    CompleteRun,
    DomainClass,
    RollbackNotSupportedError,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
    TxState,
    completion_digest,
    completion_problems,
)
from spine.governance.units import CommitOutcome, Committed, GuardFailed, Record, StaleEpoch, StorageFailed
from spine.kernel.errors import JournalError, SpineError
from spine.kernel.messages import Envelope
from spine.publisher import POST, Event

# How long a completion waits for the first delivery of its events before it answers without it.
FIRST_DELIVERY_S = 1.0
POLL_S = 0.05


class Row(Protocol):
    """A journal row."""

    @property
    def body(self) -> Mapping[str, Any]: ...


class Source(Protocol):
    """The journal as attempts read it."""

    async def transaction(self, run_id: str, completion_key: str) -> TransactionRow | None:
        """The latest attempt under this key."""
        ...

    async def run_rows(self, run_id: str) -> Sequence[Row]:
        """The rows of the run in order."""
        ...

    async def parked(self, domain: str | None = None, limit: int = 1_000) -> Sequence[object]:
        """The steps whose rollback waits for an operator."""
        ...


class Attempts:
    """Completes runs for one coordinator."""

    def __init__(
        self, deps: Dependencies, source: Source, parts: Sequence[Part], driving: Driving, outbox: Outbox
    ) -> None:
        self._deps = deps
        self._source = source
        self._parts = parts
        self._driving = driving
        self._outbox = outbox
        self._exchange = deps.exchange
        # What runs here; each tells those who wait for it which transaction failed.
        self._running: dict[tuple[str, str], asyncio.Future[str]] = {}
        self._sagas: dict[str, Saga] = {}
        self._stopping = False

    def __len__(self) -> int:
        return len(self._running) + len(self._sagas)

    def drives(self, tx_id: str) -> bool:
        """Whether this coordinator goes on with the transaction."""
        return tx_id in self._sagas

    def interrupt(self) -> None:
        """The Spine stops: nobody waits for what others have to end, and calls under way are given up."""
        self._stopping = True
        for saga in self._sagas.values():
            saga.interrupt()

    async def complete(self, envelope: Envelope, request: CompleteRun) -> TransactionResult:
        """Complete the run; raises ``TransactionFailed``, ``CompletionConflict`` or ``RollbackNotSupportedError``."""
        if problems := completion_problems(request):
            raise TransactionFailed(
                f"run {request.run_id!r} was not completed: {'; '.join(problems)}",
                TransactionPhase.NOT_STARTED,
                code="INVALID_PARAMS",
            )
        key = (request.run_id, request.completion_key)
        waited, mine = "", ""
        while (running := self._running.get(key)) is not None:
            await asyncio.wait([running], timeout=max(0.0, envelope.deadline - self._exchange.clock.monotonic()))
            if envelope.done:
                raise endings.unavailable(request, "another completion of it took longer than its caller waits")
            waited = waited or (running.result() if running.done() else "")
        self._running[key] = self._exchange.loop.create_future()
        try:
            return await self._attempt(envelope, request, waited)
        except TransactionFailed as error:
            mine = error.transaction_id or ""
            raise
        except JournalError as error:
            raise endings.unavailable(request, str(error)) from error
        finally:
            self._running.pop(key).set_result("" if mine == waited else mine)

    async def resume(self, plan: Plan) -> None:
        """Go on with a transaction that was taken over; nobody waits for its result."""
        saga = Saga(self._driving, plan)
        try:
            await self._drive(saga)
        except (TransactionFailed, Lost):
            # Both are in the journal, for whoever asks.
            return
        finally:
            self._driving.counts["recovered"] += plan.state.in_flight is False

    async def _attempt(self, envelope: Envelope, request: CompleteRun, waited: str) -> TransactionResult:
        """``waited`` is the transaction whose end the caller waits for: if it was aborted, that is the answer."""
        # What the run's buffered operations left stands before its completion, and is counted by it.
        await self._deps.recorder.flushed()
        digest = completion_digest(request)
        began = self._exchange.clock.monotonic()
        while not envelope.done:
            owner = self._deps.runs.cached(request.run_id) or await self._deps.runs.tenant(request.run_id)
            try:
                if owner is not None and owner != request.tenant_id:
                    raise TransactionFailed(
                        f"run {request.run_id!r} belongs to another tenant, not to {request.tenant_id!r}",
                        TransactionPhase.NOT_STARTED,
                        code="TENANT_MISMATCH",
                    )
                prior = None
                if owner is not None:
                    prior = await self._source.transaction(request.run_id, request.completion_key)
                if prior is not None and TxState(prior.state).in_flight:
                    waited = prior.tx_id
                    await self._wait_for(request, prior, digest)
                    continue
                if prior is not None and (
                    prior.state not in (TxState.ABORTED, TxState.ABORTED_MANUAL)
                    or (prior.tx_id, prior.digest) == (waited, digest)
                ):
                    return await self._stored(request, prior, digest)
                if not await self._may_begin(envelope, request, starts=owner is None):
                    continue
                plan = await self._plan(request, prior, digest, starts=owner is None)
                ended = await (
                    self._saga(envelope, plan, began) if plan.external else self._at_once(envelope, plan, began)
                )
                if ended is not None:
                    return ended
                waited = plan.tx_id
            finally:
                if owner is None:
                    self._deps.runs.abandoned(request.run_id)
        raise endings.unavailable(request, "the ground kept moving until nobody waited for it any more")

    async def _wait_for(self, request: CompleteRun, prior: TransactionRow, digest: str) -> None:
        """Another attempt is in flight: here, in another process, or waiting to be taken over."""
        if prior.digest != digest:
            raise endings.conflict(request, prior, digest)
        if self._stopping:
            raise endings.in_flight(request, prior)
        clock = self._exchange.clock
        await clock.sleep_until(clock.monotonic() + POLL_S)

    # -- whether it may begin

    async def _may_begin(self, envelope: Envelope, request: CompleteRun, *, starts: bool) -> bool:
        """Refuse, before any effect and on the record, what could not be undone or must not begin.

        ``False`` when the run was started by somebody else meanwhile, so that it must be looked at again.
        """
        refusal = await self._refusal(request)
        if refusal is None:
            return True
        now, code = self._exchange.clock.time_us(), getattr(refusal, "code", None) or "ROLLBACK_NOT_SUPPORTED"
        fields = {
            "run_id": request.run_id,
            "tenant_id": request.tenant_id,
            "completion_key": request.completion_key,
            "code": code,
            "reason": text(str(refusal)),
        }
        rows = [*self._start(request, now, starts=starts), Record("tx.refused", now, fields)]
        outcome = await self._driving.recorder.commit(rows, run_id=request.run_id, parent=envelope)
        if not await self._settled(request, outcome):
            return False
        if starts:
            self._deps.runs.started(request.run_id, request.tenant_id)
        raise refusal

    async def _refusal(self, request: CompleteRun) -> SpineError | None:
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
            if getattr(part.domain, "refuse_when_parked", False) and await self._source.parked(part.name, 1):
                return TransactionFailed(
                    f"{run}a rollback of domain {part.name!r} is parked; see `spine parked` and resolve it first",
                    TransactionPhase.NOT_STARTED,
                    code="DOMAIN_PARKED",
                    failed_domain=part.name,
                )
        return None

    # -- the attempt

    async def _plan(self, request: CompleteRun, prior: TransactionRow | None, digest: str, *, starts: bool) -> Plan:
        deps, now = self._deps, self._exchange.clock.time_us()
        state = deps.switch.state.effective(now)
        tx_id = deps.ids.uuid()
        return Plan(
            request,
            tx_id,
            1 if prior is None else prior.attempt + 1,
            None if prior is None else prior.tx_id,
            digest,
            flat_text(check_start(state, completion=True), state),
            state.epoch,
            now,
            deps.instance,
            completion.steps_of(self._parts, tx_id),
            counts=(0, 0, 0) if starts else await self._operation_counts(request.run_id, request.tenant_id),
            start=self._start(request, now, starts=starts),
        )

    def _start(self, request: CompleteRun, now: int, *, starts: bool) -> list[Record]:
        """The records of a run that its completion begins."""
        if not starts:
            return []
        state = self._deps.switch.state.effective(now)
        run_id, tenant_id, agent_id = request.run_id, request.tenant_id, request.agent_id
        return implicit_start(self._deps, run_id, tenant_id, agent_id, state, now, accepted=True)

    async def _operation_counts(self, run_id: str, tenant_id: str) -> tuple[int, int, int]:
        rows = await self._source.run_rows(run_id)
        bodies = [row.body for row in rows if row.body.get("tenant_id") == tenant_id]
        decisions = [body for body in bodies if body["kind"] == "decision"]
        denied = sum(not body["allowed"] for body in decisions)
        failed = sum(body["kind"] == "outcome" and not body["success"] for body in bodies)
        return len(decisions), denied, failed

    async def _saga(self, envelope: Envelope, plan: Plan, began: float) -> TransactionResult | None:
        """Complete with domains outside; ``None`` when it must be looked at again what the journal says."""
        saga = Saga(self._driving, plan, envelope)
        self._sagas[plan.tx_id] = saga
        try:
            if not await self._settled(plan.request, await saga.begin()):
                return None
            self._started(plan)
            result = await self._drive(saga)
            result.duration_ms = round((self._exchange.clock.monotonic() - began) * 1e3)
            return result
        except Lost as lost:
            self._exchange.tracer.fault("spine.transaction.lost", exc=lost, tx_id=plan.tx_id)
            return None
        finally:
            self._sagas.pop(plan.tx_id, None)

    async def _drive(self, saga: Saga) -> TransactionResult:
        plan = saga.plan
        self._sagas[plan.tx_id] = saga
        if self._stopping:
            saga.interrupt()
        try:
            result = await saga.drive()
        finally:
            self._sagas.pop(plan.tx_id, None)
        self._log(saga.cause, plan, result)
        if plan.state is not TxState.COMMITTED:
            raise endings.failure(plan, result)
        return await self._publish(saga.cause, result, saga.events)

    async def _at_once(self, envelope: Envelope, plan: Plan, began: float) -> TransactionResult | None:
        """Complete with LOCAL domains alone: one unit of work; ``None`` when the ground moved."""
        completion.carry_out(plan)
        if plan.failed is None and (unmet := await self._driving.unmet(plan)) is not None:
            completion.unmet(plan, unmet)
        plan.duration_ms = round((self._exchange.clock.monotonic() - began) * 1e3)
        if plan.failed is None:
            rows, events, result = records.committed(plan, plan.at)
            outcome = await self._commit(envelope, plan, ["commit"], rows)
            if isinstance(outcome, GuardFailed) and outcome.guard.startswith("write "):
                plan.state = TxState.EXECUTING
                completion.guard_failed(plan, outcome.guard, outcome.found, outcome.required)
            elif not await self._settled(plan.request, outcome):
                return None
            else:
                self._driving.counts["committed"] += 1
                self._started(plan)
                self._log(envelope, plan, result)
                return await self._publish(envelope, result, events, first=bool(plan.start))
        rows = records.aborting(plan, plan.at)
        ended, result = records.aborted(plan, plan.at)
        if not await self._settled(
            plan.request, await self._commit(envelope, plan, ["abort", "compensated"], [*rows, *ended])
        ):
            return None
        self._driving.counts["aborted"] += 1
        self._started(plan)
        self._log(envelope, plan, result)
        raise endings.failure(plan, result)

    async def _commit(
        self, envelope: Envelope, plan: Plan, moves: Sequence[str], rows: Sequence[Record]
    ) -> CommitOutcome:
        """Commit a whole attempt: its begin and its end."""
        moments = [BEGIN, *(of_tx(move) for move in moves)]
        for moment in moments:
            await self._driving.failpoint(f"{moment}.before")
        outcome = await self._driving.recorder.commit(
            [*plan.start, records.begun(plan), *rows],
            writes=plan.writes if plan.failed is None else (),
            epoch=plan.governance_epoch,
            run_id=plan.request.run_id,
            parent=envelope,
        )
        if isinstance(outcome, Committed):
            for moment in moments:
                await self._driving.failpoint(f"{moment}.after")
        return outcome

    async def _settled(self, request: CompleteRun, outcome: CommitOutcome) -> bool:
        """Whether it is written; ``False`` when it must be planned again. Raises when it never will be."""
        match outcome:
            case Committed():
                return True
            case StaleEpoch():
                await self._deps.switch.refresh()
                return False
            case GuardFailed() if outcome.guard.startswith(UNWRITABLE):
                raise endings.unavailable(request, f"the record cannot be written: {outcome.guard}")
            case GuardFailed():
                return False
            case StorageFailed():
                raise endings.unavailable(request, outcome.error)
            case _:
                assert_never(outcome)

    def _started(self, plan: Plan) -> None:
        if plan.start:
            self._deps.runs.started(plan.request.run_id, plan.request.tenant_id)

    # -- what is told

    async def _publish(
        self, cause: Envelope | None, result: TransactionResult, events: Sequence[Event], *, first: bool = False
    ) -> TransactionResult:
        told = [event for event in events if not event.type.startswith(POST)]
        first_try = self._outbox.deliver(told, cause, first=first) if told else None
        for event in events[len(told) :]:
            self._outbox.deliver([event], cause, first=first)
        if first_try is None:
            return result
        await asyncio.wait([first_try], timeout=FIRST_DELIVERY_S)
        if first_try.done() and first_try.result():
            result.phase = TransactionPhase.EVENTS_PUBLISHED
            result.events_published = [event.type for event in told]
        return result

    async def _stored(self, request: CompleteRun, prior: TransactionRow, digest: str) -> TransactionResult:
        """The result of a completion that ended before; raises what it ended with."""
        body = {} if prior.seq_ended is None else await self._deps.source.body_at(prior.seq_ended)
        if prior.state != TxState.COMMITTED or not body:
            raise endings.not_committed(request, prior, body)
        if prior.digest != digest:
            raise endings.conflict(request, prior, digest)
        rows = await self._source.run_rows(request.run_id)
        return endings.stored(TransactionResult.from_dict(body["result"]), prior.tx_id, [row.body for row in rows])

    def _log(self, cause: Envelope | None, plan: Plan, result: TransactionResult) -> None:
        tracer = self._exchange.tracer
        if tracer.decisions:
            failed = plan.failed
            tracer.decision(
                f"spine.transaction.{plan.state.value.lower()}",
                actor="coordinator",
                **({"run_id": plan.request.run_id} if cause is None else tracer.identity(cause)),
                tx_id=plan.tx_id,
                phase=result.phase.value,
                failed_domain=None if failed is None else failed.name,
                error=plan.error,
                **plan.flags,
            )
