"""Attempts to complete a run: a request is answered by what an earlier attempt left, or by one of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, assert_never

from actors import completion, endings
from actors import transaction_records as records
from actors.completion import Plan
from actors.dependencies import Dependencies
from actors.moves import Driving, Lost
from actors.outbox import Outbox
from actors.records import flat_text
from actors.refusals import Refusals
from actors.rows import ContractRows, RunRows, TransactionRow
from actors.saga import Saga
from actors.starts import implicit_start
from actors.verdicts import with_verdict
from spine.governance.authority import check_start
from spine.governance.failpoints import BEGIN, of_tx
from spine.governance.transactions import (
    RAC_ROLLBACK_AUDIT_ENABLED,
    CompleteRun,
    CompletionConflict,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
    TxState,
    completion_digest,
    completion_problems,
)
from spine.governance.units import CommitOutcome, Committed, GuardFailed, Record, StaleEpoch, StorageFailed
from spine.kernel.errors import JournalBroken, JournalError
from spine.kernel.messages import Envelope
from spine.parts import Part
from spine.publisher import POST, Event

# How long a completion waits for the first delivery of its events before it answers without it.
FIRST_DELIVERY_S = 1.0
POLL_S = 0.05
# How often one caller's completion is begun anew where nothing but a driver's end undid it.
ANEW_MOST = 3


class Source(ContractRows, RunRows, Protocol):
    """The journal as attempts read it."""

    async def transaction(self, run_id: str, completion_key: str) -> TransactionRow | None:
        """The latest attempt under this key."""
        ...

    async def operation_counts(self, run_id: str, tenant_id: str) -> tuple[int, int, int]:
        """How many operations of the run were decided on, denied, and failed."""
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
        self._refusals = Refusals(deps, source, parts, driving.recorder)
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
            raise await self._refusals.told(envelope, request, endings.invalid(request, problems))
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
        except Lost:
            # Whoever has it now goes on.
            return
        except TransactionFailed:
            # It is in the journal, for whoever asks.
            pass
        self._driving.counts["recovered"] += 1

    async def _attempt(self, envelope: Envelope, request: CompleteRun, waited: str) -> TransactionResult:
        """``waited`` is the transaction whose end the caller waits for: if it was aborted, that is the answer."""
        # What the run's buffered operations left stands before its completion, and is counted by it.
        await self._deps.recorder.flushed()
        digest = completion_digest(request)
        began = self._exchange.clock.monotonic()
        anew = 0
        while not envelope.done:
            owner = self._deps.runs.cached(request.run_id) or await self._deps.runs.tenant(request.run_id)
            try:
                if owner is not None and owner != request.tenant_id:
                    raise await self._refusals.told(envelope, request, endings.foreign(request))
                prior = None
                if owner is not None:
                    prior = await self._source.transaction(request.run_id, request.completion_key)
                if prior is not None and TxState(prior.state) not in (TxState.ABORTED, TxState.ABORTED_MANUAL):
                    if prior.digest != digest and prior.state != TxState.PARKED:
                        raise await self._refusals.told(envelope, request, await self._conflict(request, prior, digest))
                    if not TxState(prior.state).in_flight:
                        return await self._stored(request, prior)
                    waited = prior.tx_id
                    await self._wait_for(request, prior)
                    continue
                if prior is not None and (prior.tx_id, prior.digest) == (waited, digest):
                    if anew == ANEW_MOST or self._stopping:
                        return await self._stored(request, prior)
                    await self._fail_like(request, prior)
                    anew += 1
                if (refusal := await self._refusals.of(request)) is not None:
                    start = self._start(request, self._exchange.clock.time_us(), starts=owner is None)
                    if await self._refusals.recorded(envelope, request, refusal, start):
                        raise refusal
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

    async def _wait_for(self, request: CompleteRun, prior: TransactionRow) -> None:
        """Another attempt is in flight: here, in another process, or waiting to be taken over."""
        if self._stopping:
            raise endings.in_flight(request, prior)
        clock = self._exchange.clock
        await clock.sleep_until(clock.monotonic() + POLL_S)

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
            counts=(0, 0, 0) if starts else await self._source.operation_counts(request.run_id, request.tenant_id),
            start=self._start(request, now, starts=starts),
            rows=() if starts else await self._source.contract_rows(request.run_id),
            rollback_audit=RAC_ROLLBACK_AUDIT_ENABLED,
        )

    def _start(self, request: CompleteRun, now: int, *, starts: bool) -> list[Record]:
        """The records of a run that its completion begins."""
        if not starts:
            return []
        state = self._deps.switch.state.effective(now)
        run_id, tenant_id, agent_id = request.run_id, request.tenant_id, request.agent_id
        return implicit_start(self._deps, run_id, tenant_id, agent_id, state, now, accepted=True)

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
        except JournalError as error:
            # It has begun, and is taken over by whoever can read the journal.
            raise endings.unavailable(plan.request, str(error), unknown=True) from error
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
        self._driving.log.ended(saga.cause, plan, result)
        if plan.state is not TxState.COMMITTED:
            raise endings.failure(plan, result)
        return await self._publish(saga.cause, plan, result, saga.events)

    async def _at_once(self, envelope: Envelope, plan: Plan, began: float) -> TransactionResult | None:
        """Complete with LOCAL domains alone: one unit of work; ``None`` when the ground moved."""
        completion.carry_out(plan)
        if plan.failed is None:
            completion.check_contract(plan)
        plan.duration_ms = round((self._exchange.clock.monotonic() - began) * 1e3)
        if plan.failed is None:
            rows, events, result = records.committed(plan, plan.at)
            outcome = await self._commit(envelope, plan, ["commit"], rows)
            if isinstance(outcome, GuardFailed) and outcome.of_write:
                plan.state = TxState.EXECUTING
                completion.guard_failed(plan, outcome.guard, outcome.found, outcome.required)
            elif not await self._settled(plan.request, outcome):
                return None
            else:
                self._driving.counts["committed"] += 1
                self._started(plan)
                self._driving.log.ended(envelope, plan, result)
                return await self._publish(envelope, plan, result, events)
        rows = records.aborting(plan, plan.at)
        ended, result = records.aborted(plan, plan.at)
        if not await self._settled(
            plan.request, await self._commit(envelope, plan, ["abort", "compensated"], [*rows, *ended])
        ):
            return None
        self._driving.counts["aborted"] += 1
        self._started(plan)
        self._driving.log.ended(envelope, plan, result)
        raise endings.failure(plan, result)

    async def _commit(
        self, envelope: Envelope, plan: Plan, moves: Sequence[str], rows: Sequence[Record]
    ) -> CommitOutcome:
        """Commit a whole attempt: its begin and its end."""
        moments = [BEGIN, *(of_tx(move) for move in moves)]
        for moment in moments:
            await self._driving.failpoint(f"{moment}.before")
        outcome = await self._driving.recorder.commit(
            with_verdict([*plan.start, records.begun(plan), *rows], plan.rows, at=plan.at),
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
            case GuardFailed() if outcome.of_record:
                raise endings.unavailable(request, f"the record cannot be written: {outcome.guard}")
            case GuardFailed():
                return False
            case StorageFailed():
                raise endings.unavailable(request, outcome.error, unknown=outcome.unknown)
            case _:
                assert_never(outcome)

    def _started(self, plan: Plan) -> None:
        if plan.start:
            self._deps.runs.started(plan.request.run_id, plan.request.tenant_id)

    # -- what is told

    async def _publish(
        self, cause: Envelope | None, plan: Plan, result: TransactionResult, events: Sequence[Event]
    ) -> TransactionResult:
        first = not completion.finalised(plan.rows)
        told = [event for event in events if not event.type.startswith(POST)]
        first_try = self._outbox.deliver(told, cause, first=first) if told else None
        for event in events[len(told) :]:
            self._outbox.deliver([event], cause, first=first)
        if first_try is None:
            return result
        with suppress(TimeoutError), self._exchange.deadlines.limit(FIRST_DELIVERY_S):
            await first_try
        if not first_try.cancelled() and first_try.result():
            result.phase = TransactionPhase.EVENTS_PUBLISHED
            result.events_published = [event.type for event in told]
            self._driving.log.published(cause, told)
        return result

    async def _fail_like(self, request: CompleteRun, prior: TransactionRow) -> None:
        """Who waited for an attempt that was rolled back is told so, unless nothing but a process's end undid it."""
        body = await self._ending(prior)
        if not body.get("interrupted"):
            raise endings.not_committed(request, prior, body)

    async def _conflict(self, request: CompleteRun, prior: TransactionRow, digest: str) -> CompletionConflict:
        begun: Mapping[str, Any] = {}
        # A damaged record keeps nobody from being told that the key is taken.
        with suppress(JournalBroken):
            begun = await self._deps.source.body_at(prior.seq_begun)
        return endings.conflict(request, prior, digest, begun)

    async def _stored(self, request: CompleteRun, prior: TransactionRow) -> TransactionResult:
        """The result of a completion that ended before; raises what it ended with."""
        body = await self._ending(prior)
        if prior.state != TxState.COMMITTED or not body:
            raise endings.not_committed(request, prior, body)
        rows = await self._source.run_rows(request.run_id, "event", "event.published")
        return endings.stored(TransactionResult.from_dict(body["result"]), prior.tx_id, [row.body for row in rows])

    async def _ending(self, prior: TransactionRow) -> Mapping[str, Any]:
        """The record of how the attempt ended; empty while it has not."""
        return {} if prior.seq_ended is None else await self._deps.source.body_at(prior.seq_ended)
