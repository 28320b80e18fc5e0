"""The registry: holds the operations, decides whether a call may run, and has every decision and outcome recorded.

It understands ``Execute``, ``StartRun``, ``SwitchGovernance``, ``RegistryStatus`` and ``Ping``. ``_check_authority`` is
the one place that decides and ``_audit_dispatch`` the one that records; what a call goes through after it has a slot is
told in ``conduct``.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, assert_never

import anyio

from actors import records
from actors.calls import Call
from actors.conduct import Conduct
from actors.dependencies import Dependencies
from actors.slots import Slots
from actors.starts import implicit_start, may_begin, start_run
from spine.governance.authority import AuthorityDecision, Question, Verdict, check, scrubbed
from spine.governance.operations import (
    Execute,
    OperationResult,
    Ping,
    RegistryStatus,
    StartRun,
    SwitchGovernance,
    timeout_problem,
)
from spine.governance.params import InvalidParams, accept, id_problem
from spine.governance.units import CommitOutcome, Record
from spine.kernel.actor import Actor
from spine.kernel.errors import Overloaded, SpineError, describe
from spine.kernel.messages import Envelope
from spine.kernel.tasks import Tasks
from spine.kernel.threads import Threads

NAME = "registry"
STOP_S = 4.0
Message = Execute | StartRun | SwitchGovernance | RegistryStatus | Ping


class Registry(Actor):
    """Operations and the authority over them."""

    name = NAME

    def __init__(self, dependencies: Dependencies) -> None:
        super().__init__(dependencies.exchange)
        self._deps = dependencies
        self._tasks = Tasks(NAME, limit=dependencies.calls_most, on_crash=self.task_crashed)
        self._slots = Slots(dependencies.operations, self.exchange.deadlines, self._slot_timeout, self._gone)
        self._conduct = Conduct(self, dependencies)
        # A thread for each slot: a shared limit would let one slow operation stall every other.
        self._threads = Threads("spine-handler")
        self._calls = dependencies.calls
        self._housekeeping: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Registry(calls={len(self._calls)}, governance={self._deps.switch.state.mode.value})"

    async def start(self) -> None:
        """Read the governance state, take the lease, and begin to keep house."""
        await self._deps.switch.refresh()
        try:
            await self._deps.recovery.enlist()
        except SpineError as error:
            self.exchange.tracer.fault("spine.housekeeping.failed", exc=error)
        self._housekeeping = self._tasks.spawn(self._deps.recovery.keep(self._watch_governance), "spine.housekeeping")

    async def stop(self) -> bool:
        """Interrupt what runs, have that recorded, and let go."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        self.interrupt()
        self._threads.close()
        ended = await self._tasks.drained(STOP_S) or await self._tasks.cancel(0.5)
        with anyio.move_on_after(STOP_S):
            await self._deps.recorder.flushed()
            await self._deps.recovery.catch_up()
        return ended and not self._calls

    def interrupt(self) -> None:
        """Cancel every running handler and refuse every call that waits for a slot."""
        for call in list(self._calls):
            call.interrupt("INTERRUPTED")
        for call in self._slots.empty():
            self._begin(call, AuthorityDecision.deny("the Spine stopped before the call had a slot", "INTERRUPTED"))

    def receive(self, envelope: Envelope) -> None:
        """Begin what the message asks for."""
        message: Message = envelope.payload
        match message:
            case Execute():
                self._accept(envelope, message)
            case StartRun():
                self._tasks.answer(envelope, start_run(self._deps, envelope, message))
            case SwitchGovernance():
                self._tasks.answer(envelope, self._deps.switch.change(envelope, message, self._deps.recorder))
            case RegistryStatus():
                envelope.reply(self._status())
            case Ping():
                envelope.reply(None)
            case _:
                assert_never(message)

    def _accept(self, envelope: Envelope, request: Execute) -> None:
        """Give the call a slot or a place in the queue for one."""
        deps = self._deps
        operation = deps.operations.get(request.operation) if isinstance(request.operation, str) else None
        name = operation.name if operation else str(records.text(str(request.operation)))[:200]
        timeout = timeout_problem(request.timeout_s)
        if timeout:
            request.timeout_s = 30.0
        call = Call(envelope, request, operation, name, self.exchange.clock.monotonic())
        call.decision_id = deps.ids.uuid()
        call.on_stuck = self._stuck
        call.threads = self._threads
        refusal = self._refusal(call, timeout)
        if refusal is not None or operation is None or self._slots.take(call):
            self._begin(call, refusal)
        elif call.nested:
            reason = (
                f"operation {name!r} runs {operation.concurrency} times already and a nested call never waits for a "
                "slot: ask again later or raise its concurrency"
            )
            self._begin(call, AuthorityDecision.deny(reason, "OVERLOADED"))
        else:
            self._slots.wait(call)

    def _refusal(self, call: Call, timeout: str | None) -> AuthorityDecision | None:
        """What is wrong with the call itself; an id that cannot be stored is left out of the record."""
        request = call.request
        wrong = {
            name: problem
            for name, value, optional in (
                ("tenant_id", request.tenant_id, False),
                ("run_id", request.run_id, True),
                ("idempotency_key", request.idempotency_key, True),
            )
            if (problem := id_problem(name, value, optional=optional))
        }
        if timeout:
            wrong["timeout_s"] = timeout
        if wrong:
            call.tenant_id = None if "tenant_id" in wrong else call.tenant_id
            call.run_id = None if wrong.keys() & {"run_id", "tenant_id"} else call.run_id
            call.key = None
            return AuthorityDecision.deny("; ".join(wrong.values()), "INVALID_PARAMS")
        operation = call.operation
        if operation is None:
            call.key = None
            reason = f"operation {call.name!r} is not registered: correct the name or register it before start"
            return AuthorityDecision.deny(reason, "UNKNOWN_OPERATION")
        try:
            call.accepted = accept(request.params, operation.params)
        except InvalidParams as error:
            call.key = None
            call.told = error.told
            return AuthorityDecision.deny(error.recorded, "INVALID_PARAMS")
        return None

    def _begin(self, call: Call, refusal: AuthorityDecision | None) -> None:
        call.queue_us = round((self.exchange.clock.monotonic() - call.envelope.enqueued) * 1e6)
        self._calls.add(call)
        try:
            call.task = self._tasks.spawn(self._conduct.run(call, refusal), on_end=partial(self._ended, call))
        except Overloaded as error:
            self._ended(call)
            call.envelope.reply(self._conduct.result(call, OperationResult.fail(str(error), "OVERLOADED"), False))

    def _ended(self, call: Call) -> None:
        thread = call.thread
        call.let_go()
        if thread is None or thread.done():
            self._free(call)
            return
        self._tell_stuck(call)
        thread.add_done_callback(partial(self._thread_ended, call))

    def _thread_ended(self, call: Call, _: object) -> None:
        self._conduct.tell_late(call)
        self._free(call)

    def _free(self, call: Call) -> None:
        self._calls.discard(call)
        following = self._slots.give(call)
        if following is not None:
            self._begin(following, None)

    def _slot_timeout(self, call: Call) -> None:
        reason = f"no slot of operation {call.name!r} came free before the deadline: it did not run"
        self._begin(call, AuthorityDecision.deny(reason, "TIMEOUT"))

    def _gone(self, call: Call) -> None:
        reason = "the caller stopped waiting before the operation had a slot"
        self._begin(call, AuthorityDecision.deny(reason, "CANCELLED"))

    def _stuck(self, call: Call) -> None:
        """A handler will not end though cancelled: answer its caller without it."""
        self._tell_stuck(call)
        self._tasks.spawn(self._conduct.give_up(call), f"{call.decision_id}.stuck")

    def _tell_stuck(self, call: Call) -> None:
        self._deps.counts.stuck += 1
        self.exchange.tracer.fault("spine.operation.stuck", operation=call.name, decision_id=call.decision_id)

    def _check_authority(self, call: Call, *, starts_run: bool) -> AuthorityDecision:
        """The one place that decides: governance state and matching rules over a frozen input."""
        deps, accepted = self._deps, call.accepted
        assert accepted is not None and call.tenant_id is not None
        call.missing = []
        state = deps.switch.state.effective(self.exchange.clock.time_us())
        question = Question(state, deps.rules[call.name], partial(call.context, call.missing), starts_run)
        try:
            verdict = check(question)
        except Exception as error:  # noqa: BLE001  supervision boundary: a failed check allows, flagged and counted
            deps.counts.check_errors += 1
            self.exchange.tracer.fault(
                "spine.authority.check_failed", exc=error, **self.exchange.tracer.identity(call.envelope)
            )
            reason = f"the authority check failed with {describe(error)}"
            verdict = Verdict(AuthorityDecision.error(reason), state, check_failed=True)
        call.verdict = scrubbed(verdict, accepted.scrub) if accepted.secrets else verdict
        deps.counts.decided(verdict)
        return call.verdict.decision

    async def _audit_dispatch(
        self, call: Call, result: OperationResult | None = None, *, starts_run: bool = False, handle_us: int = 0
    ) -> CommitOutcome | None:
        """Record a decision, or with ``result`` its outcome, once; ``None`` when it is buffered and not awaited."""
        deps, verdict = self._deps, call.verdict
        assert verdict is not None
        now = self.exchange.clock.time_us()
        rows: list[Record] = []
        if result is None:
            call.begins_run = starts_run and may_begin(verdict.governance)
            if call.begins_run:
                assert call.run_id is not None and call.tenant_id is not None
                rows += implicit_start(deps, call.run_id, call.tenant_id, None, verdict.governance, now)
            eval_us = round((self.exchange.clock.monotonic() - call.envelope.enqueued) * 1e6) - call.queue_us
            rows.append(records.decision_record(call, verdict, at=now, instance=deps.instance, eval_us=eval_us))
        else:
            rows.append(records.outcome_record(call, result, at=now, instance=deps.instance, handle_us=handle_us))
        if self.exchange.tracer.decisions:
            self._log(call, rows[-1])
        # One decision and at most one outcome: their units need no ids of their own.
        unit_id = call.decision_id if result is None else f"{call.decision_id}.outcome"
        operation = call.operation
        buffered = operation is not None and operation.durability == "buffered" and call.key is None
        if buffered and verdict.decision.allowed and not call.begins_run and not deps.recorder.full:
            deps.recorder.buffer(rows[0], verdict.governance.epoch if result is None else None)
            return None
        epoch = verdict.governance.epoch if result is None else None
        return await deps.recorder.commit(rows, epoch=epoch, run_id=call.run_id, parent=call.envelope, unit_id=unit_id)

    def _log(self, call: Call, record: Record) -> None:
        tracer, fields = self.exchange.tracer, record.fields
        event = "spine.decision" if record.kind == "decision" else "spine.outcome"
        chosen: dict[str, Any] = {
            name: fields[name]
            for name in (
                "decision_id", "tenant_id", "operation", "allowed", "code", "reason", "effect", "success", "error_code",
                "error", "governance_active", "authority_degraded", "authority_reason", "authority_code",
            )
            if name in fields
        }  # fmt: skip
        if "queue_us" in fields:
            chosen["queue_ms"] = fields["queue_us"] / 1000
        if fields.get("handle_us") is not None:
            chosen["handle_ms"] = fields["handle_us"] / 1000
        tracer.decision(event, actor=NAME, **{**tracer.identity(call.envelope), **chosen})

    async def _watch_governance(self) -> None:
        """Hear of other processes' switches while idle, and end a bypass whose time is over."""
        await self._deps.switch.refresh()
        await self._deps.switch.restore_expired(self._deps.recorder)

    def _status(self) -> dict[str, Any]:
        operations = self._deps.operations.values()
        return {
            "operations": {
                operation.name: {
                    "running": self._slots.in_use(operation),
                    "waiting": self._slots.waiting(operation.name),
                    "concurrency": operation.concurrency,
                    "timeout_s": operation.timeout_s,
                    "durability": operation.durability,
                    "idempotent": operation.idempotent,
                }
                for operation in operations
            },
            "count": len(self._deps.operations),
            "frozen": True,
            "governance": self._deps.switch.state.mode.value,
        }
