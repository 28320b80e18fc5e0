"""The coordinator: completes runs, all domains or none, and records what workers report about them.

It understands ``CompleteRun``, ``CreatePolicyEvaluation``, ``EmitLesson`` and ``Acknowledge``. Each continues in an
owned task; a completion is planned by its domains, committed as one unit, and its events are handed to the outbox
after the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from actors import completion
from actors.completion import Plan
from actors.conduct import UNWRITABLE
from actors.dependencies import Dependencies
from actors.outbox import Outbox, PendingEvents
from actors.recorder import Recorder
from actors.records import flat_text
from actors.reports import Reports
from actors.starts import implicit_start
from actors.verdicts import with_verdict
from spine.domains import Participant, RunFacts
from spine.explain.story import JournalRow
from spine.governance.authority import check_start
from spine.governance.contract import Acknowledge
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.transactions import (
    CompleteRun,
    CompletionConflict,
    StepState,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
    TxState,
    completion_digest,
    completion_problems,
)
from spine.governance.units import Committed, GuardFailed, StaleEpoch, StorageFailed
from spine.kernel.actor import Actor
from spine.kernel.errors import JournalError, SpineError
from spine.kernel.messages import Envelope
from spine.kernel.tasks import Tasks
from spine.publisher import Event, Publisher

NAME = "coordinator"
STOP_S = 4.0
# How long a completion waits for the first delivery of its events before it answers without it.
FIRST_DELIVERY_S = 1.0
COUNTED = ("committed", "aborted", "events_published", "events_failed")
Message = CompleteRun | CreatePolicyEvaluation | EmitLesson | Acknowledge


class TransactionRow(Protocol):
    """An attempt to complete a run."""

    @property
    def tx_id(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def seq_ended(self) -> int | None: ...


class Source(PendingEvents, Protocol):
    """The journal as the coordinator reads it."""

    async def transaction(self, run_id: str, completion_key: str) -> TransactionRow | None:
        """The latest attempt under this key."""
        ...

    async def run_rows(self, run_id: str) -> Sequence[JournalRow]:
        """The rows of the run in order."""
        ...


@dataclass(slots=True)
class Completions:
    """What the coordinator works with; outlives its incarnations.

    With ``redeliver`` it also delivers what Spines that live no more left undelivered.
    """

    dependencies: Dependencies
    source: Source
    participants: Sequence[Participant]
    publisher: Publisher
    recorder: Recorder
    redeliver: bool
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))


class Coordinator(Actor):
    """All domains or none."""

    name = NAME

    def __init__(self, completions: Completions) -> None:
        deps = completions.dependencies
        super().__init__(deps.exchange)
        self._own = completions
        self._deps = deps
        self._tasks = Tasks(NAME, limit=deps.calls_most, on_crash=self._task_crashed)
        self._outbox = Outbox(
            deps.exchange,
            deps.ids,
            completions.recorder,
            completions.source,
            completions.publisher,
            instance=deps.instance,
            counts=completions.counts,
        )
        self._reports = Reports(deps, completions.recorder)
        self._delivering: asyncio.Task[None] | None = None
        self._running: dict[tuple[str, str], asyncio.Future[None]] = {}

    def __repr__(self) -> str:
        return f"Coordinator(running={len(self._running)}, outbox={len(self._outbox)})"

    async def start(self) -> None:
        """Begin to deliver what is pending."""
        if self._own.redeliver:
            self._delivering = self._tasks.spawn(self._outbox.keep(), "outbox")

    async def stop(self) -> bool:
        """Let running completions end; what is undelivered stays pending in the journal."""
        if self._delivering is not None:
            self._delivering.cancel()
        waits = list(self._running.values())
        if waits:
            await asyncio.wait(waits, timeout=STOP_S)
        delivered = await self._outbox.stop(0.5)
        return await self._tasks.cancel(0.5) and delivered

    def receive(self, envelope: Envelope) -> None:
        """Begin what the message asks for."""
        message: Message = envelope.payload
        match message:
            case CompleteRun():
                self._tasks.answer(envelope, self._complete(envelope, message))
            case CreatePolicyEvaluation():
                self._tasks.answer(envelope, self._reports.evaluation(envelope, message))
            case EmitLesson():
                self._tasks.answer(envelope, self._reports.lesson(envelope, message))
            case Acknowledge():
                self._tasks.answer(envelope, self._reports.acknowledge(envelope, message))
            case _:
                assert_never(message)

    async def _complete(self, envelope: Envelope, request: CompleteRun) -> TransactionResult:
        if problems := completion_problems(request):
            raise TransactionFailed(
                f"run {request.run_id!r} was not completed: {'; '.join(problems)}",
                TransactionPhase.NOT_STARTED,
                code="INVALID_PARAMS",
            )
        key = (request.run_id, request.completion_key)
        while (running := self._running.get(key)) is not None:
            await asyncio.wait([running], timeout=max(0.0, envelope.deadline - self.exchange.clock.monotonic()))
            if envelope.done:
                raise self._unavailable(request, "another completion of it took longer than its caller waits")
        self._running[key] = self.exchange.loop.create_future()
        try:
            return await self._attempt(envelope, request)
        except JournalError as error:
            raise self._unavailable(request, str(error)) from error
        finally:
            self._running.pop(key).set_result(None)

    async def _attempt(self, envelope: Envelope, request: CompleteRun) -> TransactionResult:
        # What the run's buffered operations left stands before its completion, and is counted by it.
        await self._deps.recorder.flushed()
        digest = completion_digest(request)
        began = self.exchange.clock.monotonic()
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
                    prior = await self._own.source.transaction(request.run_id, request.completion_key)
                if prior is not None and prior.state not in (TxState.ABORTED, TxState.ABORTED_MANUAL):
                    return await self._stored(request, prior, digest)
                plan = await self._plan(request, prior, digest, starts=owner is None)
                plan.duration_ms = round((self.exchange.clock.monotonic() - began) * 1e3)
                ended = await self._write(envelope, plan)
                if ended is not None:
                    if plan.start:
                        self._deps.runs.started(request.run_id, request.tenant_id)
                    return ended
            finally:
                if owner is None:
                    self._deps.runs.abandoned(request.run_id)

        raise self._unavailable(request, "the ground kept moving until nobody waited for it any more")

    async def _plan(self, request: CompleteRun, prior: TransactionRow | None, digest: str, *, starts: bool) -> Plan:
        deps = self._deps
        now = self.exchange.clock.time_us()
        state = deps.switch.state.effective(now)
        tx_id = deps.ids.uuid()
        plan = Plan(
            request,
            tx_id,
            1 if prior is None else prior.attempt + 1,
            None if prior is None else prior.tx_id,
            digest,
            check_start(state, completion=True),
            state,
            now,
            deps.instance,
            completion.steps_of(self._own.participants, tx_id),
        )
        if starts:
            plan.start = implicit_start(
                deps, request.run_id, request.tenant_id, request.agent_id, state, now, accepted=True
            )
        if not starts:
            plan.rows = await self._own.source.run_rows(request.run_id)
        completion.carry_out(plan, self._facts(plan, self._operation_counts(plan.rows, request.tenant_id)))
        return plan

    def _facts(self, plan: Plan, counts: tuple[int, int, int]) -> RunFacts:
        request = plan.request
        return RunFacts(
            run_id=request.run_id,
            tenant_id=request.tenant_id,
            run_status=request.run_status,
            tx_id=plan.tx_id,
            completed_at=plan.at,
            agent_id=request.agent_id,
            error_code=request.error_code,
            error_message=request.error_message,
            trace_id=request.trace_id,
            is_synthetic=request.is_synthetic,
            synthetic_scenario_id=request.synthetic_scenario_id,
            completion_key=request.completion_key,
            operations=counts[0],
            operations_denied=counts[1],
            operations_failed=counts[2],
        )

    @staticmethod
    def _operation_counts(rows: Sequence[JournalRow], tenant_id: str) -> tuple[int, int, int]:
        bodies = [row.body for row in rows if row.body.get("tenant_id") == tenant_id]
        decisions = [body for body in bodies if body["kind"] == "decision"]
        denied = sum(not body["allowed"] for body in decisions)
        failed = sum(body["kind"] == "outcome" and not body["success"] for body in bodies)
        return len(decisions), denied, failed

    async def _write(self, envelope: Envelope, plan: Plan) -> TransactionResult | None:
        """Commit the plan or its abort; ``None`` when the ground moved and it must be planned again."""
        request, recorder, epoch = plan.request, self._own.recorder, plan.governance.epoch
        if plan.failed is None:
            rows, events, result = completion.committed(plan)
            rows = with_verdict(rows, plan.rows, at=plan.at)
            outcome = await recorder.commit(
                rows, writes=plan.writes, epoch=epoch, run_id=request.run_id, parent=envelope
            )
            match outcome:
                case Committed():
                    self._own.counts["committed"] += 1
                    self._log("spine.transaction.committed", envelope, plan, result)
                    return await self._publish(envelope, result, events)
                case StaleEpoch():
                    await self._deps.switch.refresh()
                    return None
                case GuardFailed() if outcome.guard.startswith("write "):
                    self._guard(plan, outcome)
                case GuardFailed() if outcome.guard.startswith(UNWRITABLE):
                    raise self._unavailable(request, f"the record cannot be written: {outcome.guard}")
                case GuardFailed():
                    return None
                case StorageFailed():
                    raise self._unavailable(request, outcome.error)
                case _:
                    assert_never(outcome)
        rows, result = completion.aborted(plan)
        rows = with_verdict(rows, plan.rows, at=plan.at)
        outcome = await recorder.commit(rows, epoch=epoch, run_id=request.run_id, parent=envelope)
        match outcome:
            case Committed():
                self._own.counts["aborted"] += 1
                if plan.start:
                    self._deps.runs.started(request.run_id, request.tenant_id)
                self._log("spine.transaction.aborted", envelope, plan, result)
                raise self._failure(plan, result)
            case StorageFailed():
                raise self._unavailable(request, outcome.error)
            case StaleEpoch():
                await self._deps.switch.refresh()
                return None
            case GuardFailed() if outcome.guard.startswith(UNWRITABLE):
                raise self._unavailable(request, f"the record cannot be written: {outcome.guard}")
            case GuardFailed():
                return None
            case _:
                assert_never(outcome)

    @staticmethod
    def _guard(plan: Plan, outcome: GuardFailed) -> None:
        """A user's write did not change what it must: find its domain and fail that."""
        number = int(outcome.guard.removeprefix("write ").partition(":")[0])
        for step in plan.steps:
            if number < len(step.writes):
                error = (
                    f"its write changed {outcome.found} rows where {outcome.required} are required ({outcome.guard})"
                )
                step.state = StepState.INTENT
                completion.fail(plan, step, StepState.REFUSED, "WRITE_GUARD", error, None)
                return
            number -= len(step.writes)
        raise SpineError(f"transaction {plan.tx_id}: {outcome.guard} belongs to no domain")

    def _failure(self, plan: Plan, result: TransactionResult) -> TransactionFailed:
        failed = plan.failed
        assert failed is not None
        return TransactionFailed(
            f"run {plan.request.run_id!r} was not completed: domain {failed.domain.name!r} ended transaction "
            f"{plan.tx_id} with {failed.code}: {failed.error}; nothing of it was written, complete the run again",
            TransactionPhase.ROLLED_BACK,
            result.to_dict(),
            plan.cause,
            code=failed.code,
            failed_domain=failed.domain.name,
            transaction_id=plan.tx_id,
        )

    @staticmethod
    def _unavailable(request: CompleteRun, detail: str) -> TransactionFailed:
        return TransactionFailed(
            f"run {request.run_id!r} was not completed because the journal does not take the record: {detail}; free "
            "its storage and complete the run again",
            TransactionPhase.FAILED,
            code="JOURNAL_UNAVAILABLE",
        )

    async def _publish(
        self, envelope: Envelope, result: TransactionResult, events: Sequence[Event]
    ) -> TransactionResult:
        if not events:
            return result
        first_try = self._outbox.deliver(events, envelope)
        await asyncio.wait([first_try], timeout=FIRST_DELIVERY_S)
        if first_try.done() and first_try.result():
            result.phase = TransactionPhase.EVENTS_PUBLISHED
            result.events_published = [event.type for event in events]
        return result

    async def _stored(self, request: CompleteRun, prior: TransactionRow, digest: str) -> TransactionResult:
        """The result of a completion that ended before."""
        if prior.state != TxState.COMMITTED or prior.seq_ended is None:
            raise TransactionFailed(
                f"run {request.run_id!r}: transaction {prior.tx_id} is {prior.state}; see `spine why {request.run_id}`",
                TransactionPhase.FAILED,
                code=prior.state,
                transaction_id=prior.tx_id,
            )
        if prior.digest != digest:
            raise CompletionConflict(
                f"run {request.run_id!r} was completed under key {request.completion_key!r} with another payload "
                f"(digest {prior.digest[:16]}, now {digest[:16]}): transaction {prior.tx_id} stands, use a new key"
            )
        body = await self._deps.source.body_at(prior.seq_ended)
        result = TransactionResult.from_dict(body["result"])
        published = [
            row.body["type"] for row in await self._own.source.run_rows(request.run_id)
            if row.body["kind"] == "event" and row.body["tx_id"] == prior.tx_id
        ]  # fmt: skip
        if published and await self._delivered(request.run_id, prior.tx_id):
            result.phase, result.events_published = TransactionPhase.EVENTS_PUBLISHED, published
        return result

    async def _delivered(self, run_id: str, tx_id: str) -> bool:
        rows = await self._own.source.run_rows(run_id)
        return any(row.body["kind"] == "event.published" and row.body["tx_id"] == tx_id for row in rows)

    def _log(self, event: str, envelope: Envelope, plan: Plan, result: TransactionResult) -> None:
        tracer = self.exchange.tracer
        if tracer.decisions:
            failed = plan.failed
            tracer.decision(
                event,
                actor=NAME,
                **tracer.identity(envelope),
                tx_id=plan.tx_id,
                phase=result.phase.value,
                failed_domain=None if failed is None else failed.domain.name,
                error=None if failed is None else failed.error,
                **flat_text(plan.decision, plan.governance),
            )

    def _task_crashed(self, name: str, error: BaseException) -> None:
        self.exchange.tracer.fault("spine.task.crashed", exc=error, actor=NAME, task=name)
