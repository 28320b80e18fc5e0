"""The way of one call after its slot: key, decision, handler, outcome; runs in a task the registry owns."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from functools import partial
from threading import get_ident
from typing import Any, Protocol, assert_never

from actors import records
from actors.calls import ANSWER_MARGIN_S, Call, run_handler
from actors.dependencies import Dependencies
from spine.governance.authority import AuthorityDecision, Verdict, flat
from spine.governance.operations import Execute, OperationResult, ungoverned
from spine.governance.units import CommitOutcome, Committed, GuardFailed, StaleEpoch, StorageFailed
from spine.kernel.errors import ActorCrashed, ConfigurationError, JournalError, MailboxClosed, Overloaded, describe
from spine.kernel.messages import Lane

REGISTRY = "registry"
# How the journal names a record that no second try will get written.
NOT_RECORDED = "its decision was not recorded: "


class Authority(Protocol):
    """What the registry does for a call: decide, and record."""

    def _check_authority(self, call: Call, *, starts_run: bool) -> AuthorityDecision: ...

    async def _audit_dispatch(
        self, call: Call, result: OperationResult | None = None, *, starts_run: bool = False, handle_us: int = 0
    ) -> CommitOutcome | None: ...


class Conduct:
    """Takes calls through their stages; every stage's end is an ``OperationResult``."""

    def __init__(self, authority: Authority, dependencies: Dependencies) -> None:
        self._authority = authority
        self._deps = dependencies
        self._now = dependencies.exchange.clock.monotonic
        self._thread = get_ident()

    async def run(self, call: Call, refusal: AuthorityDecision | None) -> None:
        """Answer the call, whatever happens on the way."""
        result: OperationResult | None = None
        try:
            result = await self._answer(call, refusal)
        except JournalError as error:
            result = self._unavailable(call, NOT_RECORDED + str(error))
        except Exception as error:
            call.envelope.fail(ActorCrashed(REGISTRY, call.decision_id, 0, describe(error)))
            raise
        finally:
            if call.key is not None and not call.settled:
                self._deps.recall.settle(call, result if result is not None and result.durable else None)
        if not call.settled:
            call.settled = True
            call.envelope.reply(result)

    async def give_up(self, call: Call) -> None:
        """Answer the caller of a handler that swallowed its cancellation; it keeps its slot until it ends."""
        call.settled = True
        result = OperationResult.fail(
            f"the handler of {call.name!r} swallowed its cancellation and still runs; it keeps its slot until it ends",
            call.cause or "TIMEOUT",
        )
        answer = await self._outcome(call, result, call.began)
        if call.key is not None:
            self._deps.recall.settle(call, answer if answer.durable else None)
        call.envelope.reply(answer)

    def tell_late(self, call: Call) -> None:
        """A handler ended after its caller had been answered without it."""
        self._deps.exchange.tracer.fault(
            "spine.operation.late", operation=call.name, decision_id=call.decision_id, run_id=call.run_id
        )

    async def _answer(self, call: Call, refusal: AuthorityDecision | None) -> OperationResult:
        refusal = refusal or self._overdue(call)
        if refusal is None and call.key is not None:
            stored = await self._deps.recall.recall(call)
            if isinstance(stored, OperationResult):
                return stored
            refusal = stored
        committed = await self._decide(call, refusal)
        if isinstance(committed, OperationResult):
            return committed
        assert call.verdict is not None
        decision = call.verdict.decision
        if not decision.allowed:
            return self.result(
                call, OperationResult(False, None, call.told or decision.reason, decision.code), committed
            )
        overdue = self._overdue(call)
        began = self._now()
        if overdue is not None:
            return await self._outcome(call, OperationResult.fail(overdue.reason, overdue.code), began)
        call.began = began
        call.ctx = call.context([], nested=partial(self._nested, call))
        result = await run_handler(call)
        if call.settled:
            self.tell_late(call)
            return result
        return await self._outcome(call, result, began)

    def _overdue(self, call: Call) -> AuthorityDecision | None:
        """Why what has not started will not start."""
        if call.cause is not None:
            return AuthorityDecision.deny(
                f"the Spine stopped or its registry restarted before operation {call.name!r} started: it did not run",
                call.cause,
            )
        if self._now() >= call.deadline:
            return AuthorityDecision.deny(
                f"the deadline passed before operation {call.name!r} started: it did not run", "TIMEOUT"
            )
        if call.envelope.done:
            return AuthorityDecision.deny("the caller stopped waiting before the operation started", "CANCELLED")
        return None

    async def _decide(self, call: Call, refusal: AuthorityDecision | None) -> bool | OperationResult:
        """Decide and have the decision committed, again if the ground moved; gives whether it is durable yet."""
        deps = self._deps
        while True:
            run_id = call.run_id
            owner = None if run_id is None else deps.runs.cached(run_id) or await deps.runs.tenant(run_id)
            starts = run_id is not None and owner is None
            if owner is not None and owner != call.tenant_id:
                refusal = self._foreign(call)
            try:
                outcome = await self._decide_once(call, refusal, starts)
            finally:
                if starts and run_id is not None:
                    deps.runs.abandoned(run_id)
            match outcome:
                case None:
                    return False
                case Committed():
                    if call.begins_run and run_id is not None and call.tenant_id is not None:
                        deps.runs.started(run_id, call.tenant_id)
                    return True
                case StaleEpoch():
                    await deps.switch.refresh()
                case GuardFailed() if outcome.of_record:
                    return self._unavailable(call, f"{NOT_RECORDED}the record cannot be written: {outcome.guard}")
                case GuardFailed():
                    if call.key is not None:
                        deps.recall.settle(call, None)
                        stored = await deps.recall.recall(call)
                        if isinstance(stored, OperationResult):
                            return stored
                        refusal = stored
                case StorageFailed():
                    if outcome.unknown:
                        self._close_later(call)
                    return self._unavailable(call, outcome.told("its decision"))
                case _:
                    assert_never(outcome)
            if self._now() >= call.deadline + ANSWER_MARGIN_S:
                return self._unavailable(call, f"{NOT_RECORDED}the governance state kept changing meanwhile")

    async def _decide_once(self, call: Call, refusal: AuthorityDecision | None, starts: bool) -> CommitOutcome | None:
        if refusal is not None:
            # A refused call owns no key: it must not answer for the call that does, or for the next try.
            if call.key is not None:
                self._deps.recall.settle(call, None)
                call.key = None
            state = self._deps.switch.state.effective(self._deps.exchange.clock.time_us())
            call.verdict = Verdict(refusal, state)
            self._deps.counts.decided(call.verdict)
        else:
            self._authority._check_authority(call, starts_run=starts)
        return await self._authority._audit_dispatch(call, starts_run=starts)

    def _close_later(self, call: Call) -> None:
        """Its decision may be in the journal, open: nothing will run under it."""
        assert call.verdict is not None
        if call.verdict.decision.allowed:
            error = f"operation {call.name!r} did not run: whether its decision was recorded was not known in time"
            self._remember(call, OperationResult.fail(error, "INTERRUPTED"), 0)

    def _remember(self, call: Call, result: OperationResult, handle_us: int) -> None:
        at, instance = self._deps.exchange.clock.time_us(), self._deps.instance
        self._deps.recovery.remember(
            records.outcome_record(call, result, at=at, instance=instance, handle_us=handle_us)
        )

    def _foreign(self, call: Call) -> AuthorityDecision:
        if call.key is not None:
            self._deps.recall.settle(call, None)
        run_id = call.run_id
        call.claimed_run_id, call.run_id, call.key = run_id, None, None
        return AuthorityDecision.deny(
            f"run {run_id!r} belongs to another tenant than {call.tenant_id!r}: use the tenant's own run",
            "TENANT_MISMATCH",
        )

    def _nested(self, call: Call, operation: str, params: Mapping[str, Any] | None) -> Awaitable[OperationResult]:
        if get_ident() != self._thread:
            raise ConfigurationError(
                f"the synchronous handler of {call.name!r} called execute outside the event loop: call "
                "anyio.from_thread.run(ctx.execute, operation, params) in it, or make it async"
            )
        return self._nest(call, operation, params)

    async def _nest(self, call: Call, operation: str, params: Mapping[str, Any] | None) -> OperationResult:
        """A handler calls another operation: through the spine mailbox, in the time that is left."""
        if call.settled or not call.handling:
            raise ConfigurationError(
                f"execute was called for the handler of {call.name!r} after its end: what it starts it must wait for"
            )
        left = max(call.deadline - self._now(), 1e-3)
        exchange = self._deps.exchange
        request = Execute(operation, str(call.tenant_id), call.run_id, params, None, left, call.decision_id)
        try:
            envelope = exchange.post(
                request,
                REGISTRY,
                timeout_s=left + ANSWER_MARGIN_S,
                sender=f"operation {call.name}",
                lane=Lane.INGRESS,
                parent=call.envelope,
            )
        except Overloaded as error:
            return ungoverned(str(operation), str(error), "OVERLOADED", self._deps.switch.state)
        except MailboxClosed as error:
            return ungoverned(str(operation), str(error), "INTERRUPTED", self._deps.switch.state)
        answer: OperationResult = await exchange.answer(envelope)
        return answer

    async def _outcome(self, call: Call, result: OperationResult, began: float) -> OperationResult:
        """Have the outcome recorded before the caller hears of it."""
        handle_us = round((self._now() - began) * 1e6)
        if call.key is not None:
            assert call.accepted is not None
            result = records.storable(call.name, result, call.accepted.scrub)
        outcome = await self._authority._audit_dispatch(call, result, handle_us=handle_us)
        if outcome is None or isinstance(outcome, Committed):
            return self.result(call, result, outcome is not None)
        self._remember(call, result, handle_us)
        ended = "succeeded" if result.success else f"failed with {result.error_code}"
        match outcome:
            case StorageFailed():
                why = f"{outcome.told('its outcome')}; it is recorded when the journal takes writes again"
            case GuardFailed() if not outcome.of_record:
                why = (
                    "another process, which took this one for dead, had closed its decision as INTERRUPTED: how it "
                    "ended is recorded as outcome.late"
                )
            case _:
                why = f"its outcome cannot be recorded: {outcome}"
        error = f"operation {call.name!r} ran and {ended}, but {why}"
        return self.result(call, OperationResult(False, result.data, error, "OUTCOME_UNRECORDED"), False)

    def _unavailable(self, call: Call, why: str) -> OperationResult:
        error = f"operation {call.name!r} did not run: {why}; free the journal's storage and ask again"
        return self.result(call, OperationResult.fail(error, "JOURNAL_UNAVAILABLE"), False)

    def result(self, call: Call, result: OperationResult, durable: bool) -> OperationResult:
        """The result as the caller gets it: with the decision, its authority fields and the time it took."""
        verdict = call.verdict
        if verdict is None:
            decision = AuthorityDecision.deny(result.error or "", result.error_code or "DENIED")
            fields = flat(decision, self._deps.switch.state)
        else:
            decision = verdict.decision
            fields = flat(decision, verdict.governance)
        fields["decision_id"] = call.decision_id
        if call.missing:
            fields["missing_inputs"] = tuple(call.missing)
        if result.metadata:
            fields = {**result.metadata, **fields}
        return OperationResult(
            result.success,
            result.data,
            result.error,
            result.error_code if result.success or result.error_code else "FAILED",
            call.name,
            round((self._now() - call.envelope.enqueued) * 1e3, 3),
            durable,
            decision,
            fields,
        )
