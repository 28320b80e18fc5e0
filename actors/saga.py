"""A saga: drives one transaction with EXTERNAL steps, every move durable before what follows from it.

Forward in order, each intent before its call; the commit point, or a durable decision to abort and then the undoing in
reverse, repeated with backoff and parked where it fails. What another process has taken over is left to it.
"""

from __future__ import annotations

import asyncio

from actors import transaction_records as records
from actors.completion import (
    Plan,
    Step,
    as_json,
    check_contract,
    described,
    fail,
    fail_with,
    give_up,
    guard_failed,
    next_asked,
    prepare,
    stood_on,
)
from actors.effect_calls import Answer, Answered, Unanswered
from actors.moves import Driving, Lost, Moves
from actors.records import text
from spine.domains import Refused, said_by
from spine.effects import TOMBSTONED, Effect
from spine.governance.failpoints import of_step, of_tx
from spine.governance.recordable import copied
from spine.governance.transactions import INTERRUPTED, STALLED, UNDONE_FROM, StepState, TransactionResult, TxState
from spine.governance.units import CommitOutcome
from spine.kernel.errors import with_code
from spine.kernel.messages import Envelope
from spine.kernel.restart import backoff
from spine.kernel.tasks import cancelling
from spine.publisher import Event

# So many drivers may end in a row, without bringing a transaction further, before the next does not try it once more.
STALLED_MOST = 10


class Saga:
    """One transaction, from its begin or from wherever the journal says it stands."""

    def __init__(self, driving: Driving, plan: Plan, cause: Envelope | None = None) -> None:
        self._own = driving
        self._clock = driving.exchange.clock
        self._moves = Moves(driving, plan, cause)
        self.plan = plan
        self.cause = cause
        self._stopping = False
        self._call: asyncio.Task[Answer] | None = None
        self.events: list[Event] = []
        self.result: TransactionResult | None = None

    def interrupt(self) -> None:
        """The Spine stops: a forward call under way is given up and undone, a rollback may still end."""
        self._stopping = True
        if self._call is not None and self.plan.state is TxState.EXECUTING:
            self._call.cancel()

    async def begin(self) -> CommitOutcome:
        """Record the transaction with its plan; whoever else began it first keeps it."""
        return await self._moves.begin()

    async def drive(self) -> TransactionResult:
        """Go on until the transaction has ended or is parked; ``plan.state`` tells which. Raises ``Lost``."""
        if self.plan.state is TxState.EXECUTING:
            await self._forward()
        if self.plan.state is TxState.COMPENSATING:
            await self._compensate()
        assert self.result is not None
        return self.result

    # -- forward

    async def _forward(self) -> None:
        plan = self.plan
        stalled = self._stalled()
        for step in plan.steps:
            if step is stalled:
                give_up(plan, step, f"{self._ended()} where domain {step.name!r} was next")
            elif step.external:
                await self._forward_step(step)
            else:
                prepare(plan, step)
            if plan.failed is not None:
                break
            if self._stopping:
                raise Lost(f"the Spine stops: transaction {plan.tx_id} goes on after the start")
        if plan.failed is None:
            await self._commit_point()
        if plan.failed is not None and plan.state is TxState.EXECUTING:
            await self._abort()

    async def _forward_step(self, step: Step) -> None:
        plan = self.plan
        if step.state is StepState.DONE:
            return
        # Each driver that ended after the intent stands for one attempt at least.
        sent = plan.stalled if step.state is StepState.INTENT else 0
        if step.state is StepState.PLANNED:
            try:
                step.descriptor = described(plan, step)
            except BaseException as error:  # noqa: BLE001  a domain is foreign code: its failure rolls the completion back
                fail_with(plan, step, error)
                return
            intent = records.moved(plan, step, "intend", self._clock.time_us(), descriptor=step.descriptor)
            await self._moves.step(step, "intend", [intent])
        answer = await self._send(step, sent)
        match answer:
            case Answered():
                await self._done(step, answer)
            case Refused():
                fail_with(plan, step, answer)
            case Unanswered():
                fail(plan, step, StepState.UNKNOWN, answer.code, answer.error, answer.cause)

    async def _done(self, step: Step, answer: Answered) -> None:
        plan, value = self.plan, answer.value
        try:
            what = f"domain {step.name!r} returned {type(value).__name__}, which"
            step.result = as_json({} if value is None else value, what)
        except BaseException as error:  # noqa: BLE001  what a domain returns is foreign code too
            # It happened, but cannot be recorded: nobody could be told of it again.
            fail_with(plan, step, error)
            return
        at = self._clock.time_us()
        done = records.moved(plan, step, "done", at, result=step.result)
        told = [records.delivered(plan, step, at)] if records.acknowledged_at_once(plan, step) else []
        await self._moves.step(step, "done", [done, *told])

    async def _send(self, step: Step, sent: int) -> Answer:
        """Call the domain until it answers or its attempts are used up."""
        if sent and await self._status(step) == TOMBSTONED:
            return Unanswered("TOMBSTONED", f"domain {step.name!r} has undone this effect already")
        answer: Answer = (
            Unanswered(INTERRUPTED, f"the process ended before domain {step.name!r} had answered")
            if sent == 1
            else Unanswered(STALLED, f"{self._ended()} before domain {step.name!r} had answered")
        )
        for attempt in range(sent + 1, step.attempts + 1):
            if attempt > sent + 1:
                await self._pause(attempt - 1)
            answer = await self._ask("forward", step, attempt)
            if not isinstance(answer, Unanswered) or self._stopping:
                break
            self._fault("spine.effect.unanswered", step, answer, attempt)
        return answer

    async def _commit_point(self) -> None:
        plan = self.plan
        while True:
            await self._moves.read_contract()
            check_contract(plan)
            if plan.failed is not None:
                return
            rows, events, result = records.committed(plan, self._clock.time_us())
            outcome = await self._moves.commit(rows, plan.writes)
            if outcome is None:
                break
            plan.state = TxState.EXECUTING
            if not outcome.of_verdict:
                guard_failed(plan, outcome.guard, outcome.found, outcome.required)
                return
        self._own.counts["committed"] += 1
        self.events, self.result = events, result

    # -- back

    async def _abort(self) -> None:
        plan, failed, at = self.plan, self.plan.failed, self._clock.time_us()
        assert failed is not None
        rows = records.aborting(plan, at)
        if failed.external and failed.state is not StepState.PLANNED:
            move = failed.state.value.lower()
            moved = records.step_record(plan, failed, move, at)
            await self._moves.write([of_step(move), of_tx("abort")], [moved, *rows])
            self._own.log.moved(self.cause, plan, failed, move)
        else:
            await self._moves.write([of_tx("abort")], rows)

    async def _compensate(self) -> None:
        plan, failed = self.plan, self.plan.failed
        assert failed is not None
        reason = f"{failed.name}: {with_code(plan.code, plan.error)}"
        stuck: list[Step] = []
        for step in reversed(plan.steps):
            if not step.external or step.state not in UNDONE_FROM:
                continue
            # What stands on an effect that could not be undone keeps that effect from being undone.
            if step.name in stood_on(plan.steps, stuck) or not await self._undo(step, reason):
                stuck.append(step)
        at = self._clock.time_us()
        if stuck:
            rows, self.result = records.parked(plan, at)
            await self._moves.end("park", rows)
            self._own.counts["parked"] += 1
        else:
            rows, self.result = records.aborted(plan, at)
            await self._moves.end("compensated", rows)
            self._own.counts["aborted"] += 1

    async def _undo(self, step: Step, reason: str) -> bool:
        """Roll one step back, with backoff; ``False`` when it is parked."""
        plan, again = self.plan, step.state in (StepState.RB_INTENT, StepState.PARKED)
        given_up = step.state is StepState.RB_INTENT and plan.stalled >= STALLED_MOST
        if step.state is not StepState.RB_INTENT:
            intent = records.moved(plan, step, "undo", self._clock.time_us())
            await self._moves.step(step, "undo", [intent])
        attempts: int | None
        if given_up:
            attempts = None
            step.code, step.error = STALLED, f"{self._ended()} where domain {step.name!r} was asked to undo it"
        elif again and await self._status(step) == TOMBSTONED:
            attempts = 0
        else:
            attempts = await self._roll_back(step)
        at = self._clock.time_us()
        if attempts is None:
            tried = plan.stalled if given_up else self._own.retry.attempts
            parked = records.moved(plan, step, "park", at, attempts=tried)
            await self._moves.step(step, "park", [parked])
            return False
        undone = records.rolled_back(plan, step, at, reason=reason, attempts=attempts)
        await self._moves.step(step, "undone", undone)
        self._own.counts["compensated"] += 1
        return True

    async def _roll_back(self, step: Step) -> int | None:
        """Call the domain until it has undone the effect; at which attempt it did, ``None`` when it never did."""
        for attempt in range(1, self._own.retry.attempts + 1):
            if attempt > 1:
                await self._pause(attempt - 1)
            answer = await self._ask("rollback", step, attempt)
            if isinstance(answer, Answered):
                return attempt
            self._fault("spine.rollback.failed", step, answer, attempt)
            if self._stopping:
                raise Lost(
                    f"the Spine stops: the rollback of {step.name!r} in {self.plan.tx_id} goes on after the start"
                )
            code, step.hiccup = _said(answer)
            if attempt == self._own.retry.attempts:
                # It will be parked, and this is why; a step that is undone keeps what it failed with itself.
                step.code, step.error = code, step.hiccup
        return None

    def _stalled(self) -> Step | None:
        """The step that is not tried once more, where so many have ended that it must be what ends them."""
        return next_asked(self.plan) if self.plan.stalled >= STALLED_MOST else None

    def _ended(self) -> str:
        return f"{self.plan.stalled} processes in a row ended, or lost the transaction,"

    # -- the edge

    async def _ask(self, what: str, step: Step, attempt: int) -> Answer:
        plan = self.plan
        effect = Effect(
            step.effect_id,
            plan.tx_id,
            plan.request.run_id,
            plan.request.tenant_id,
            plan.epoch,
            attempt,
            self._clock.monotonic() + step.timeout_s,
            # Its own: what it changes in it must not reach the next call.
            copied(dict(step.descriptor)),
        )
        method = getattr(step.domain, what)
        call = self._call = self._own.exchange.loop.create_task(self._own.calls.call(step.name, what, method, effect))
        try:
            return await call
        except asyncio.CancelledError:
            if call.cancelled() and self._stopping and not cancelling():
                return Unanswered(INTERRUPTED, f"the Spine stopped while domain {step.name!r} was asked")
            call.cancel()
            raise
        finally:
            self._call = None

    async def _status(self, step: Step) -> object:
        """What the domain says of the effect, if it can tell; ``None`` where it cannot."""
        if getattr(step.domain, "status", None) is None:
            return None
        answer = await self._ask("status", step, 1)
        return answer.value if isinstance(answer, Answered) else None

    async def _pause(self, attempt: int) -> None:
        retry = self._own.retry
        jitter = self._own.ids.uniform(0.0, 0.25)
        delay = backoff(attempt, first_s=retry.first_s, most_s=retry.most_s, jitter=jitter)
        await self._clock.sleep_until(self._clock.monotonic() + delay)

    def _fault(self, event: str, step: Step, answer: Refused | Unanswered, attempt: int) -> None:
        code, error = _said(answer)
        self._own.exchange.tracer.fault(
            event,
            tx_id=self.plan.tx_id,
            run_id=self.plan.request.run_id,
            domain=step.name,
            effect_id=step.effect_id,
            attempt=attempt,
            code=code,
            error=error,
        )


def _said(answer: Refused | Unanswered) -> tuple[str, str]:
    """What an answer that is no success is recorded as."""
    code, error = said_by(answer) if isinstance(answer, Refused) else (answer.code, answer.error)
    return str(text(code)), str(text(error))
