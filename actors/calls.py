"""One call of an operation from its admission to its result: what is known of it, and how its handler is run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import structlog
from pydantic import BaseModel

from spine.governance.authority import Verdict
from spine.governance.operations import Execute, Nested, Operation, OperationContext, OperationResult
from spine.governance.params import Accepted
from spine.kernel.errors import describe
from spine.kernel.messages import Envelope
from spine.kernel.threads import Threads

# A caller is answered at most this long after the operation's own deadline: time to cancel and to record.
ANSWER_MARGIN_S = 10.0
# How long a cancelled handler may take to end before its caller is answered without it.
CANCEL_GRACE_S = 1.0


class Call:
    """The state of one call; owned by the registry, expired by the deadline wheel."""

    __slots__ = (
        "accepted",
        "attempt",
        "began",
        "begins_run",
        "cause",
        "claimed_run_id",
        "ctx",
        "deadline",
        "decision_id",
        "envelope",
        "handling",
        "key",
        "missing",
        "name",
        "on_stuck",
        "operation",
        "queue_us",
        "request",
        "run_id",
        "settled",
        "slotted",
        "task",
        "tenant_id",
        "thread",
        "threads",
        "told",
        "verdict",
    )

    def __init__(
        self, envelope: Envelope, request: Execute, operation: Operation | None, name: str, now: float
    ) -> None:
        limit = request.timeout_s if operation is None else min(operation.timeout_s, request.timeout_s)
        self.envelope = envelope
        self.request = request
        self.operation = operation
        self.name = name
        # A nested call's deadline is its parent's at the latest.
        self.deadline = min(envelope.enqueued + limit, envelope.deadline - ANSWER_MARGIN_S)
        self.began = now
        self.tenant_id: str | None = request.tenant_id
        self.run_id: str | None = request.run_id
        self.claimed_run_id: str | None = None
        self.key: str | None = request.idempotency_key
        self.attempt = 1
        self.queue_us = 0
        self.decision_id = ""
        self.missing: list[str] = []
        self.accepted: Accepted | None = None
        self.ctx: OperationContext | None = None
        self.verdict: Verdict | None = None
        self.task: asyncio.Task[None] | None = None
        self.cause: str | None = None
        self.handling = False
        self.settled = False
        self.slotted = False
        self.begins_run = False
        self.told: str | None = None
        self.threads: Threads | None = None
        self.thread: asyncio.Future[object] | None = None
        self.on_stuck: Callable[[Call], None] | None = None

    def context(self, missing: list[str], nested: Nested | None = None) -> OperationContext:
        """What one rule or the handler sees: its own, so that nobody's change reaches anybody else."""
        accepted = self.accepted
        assert accepted is not None
        assert self.tenant_id is not None
        return OperationContext(
            operation=self.name,
            tenant_id=self.tenant_id,
            run_id=self.run_id,
            params=accepted.view(missing),
            model=None if accepted.model is None else accepted.model.model_copy(deep=True),
            deadline=self.deadline,
            idempotency_key=self.key,
            attempt=self.attempt,
            nested=nested,
        )

    def let_go(self) -> None:
        """Drop what refers back to the call, so that it is freed at once and not by the garbage collector."""
        self.task = None
        self.thread = None
        self.ctx = None
        self.on_stuck = None

    @property
    def nested(self) -> bool:
        """Whether a handler made this call."""
        return self.request.parent is not None

    def interrupt(self, cause: str) -> None:
        """Cancel the handler, or keep it from starting; the outcome will carry ``cause``."""
        if self.cause is None:
            self.cause = cause
            if self.handling and self.task is not None:
                self.task.cancel()
                exchange = self.envelope.exchange
                exchange.deadlines.discard(self.deadline, self)
                self.deadline = exchange.clock.monotonic() + CANCEL_GRACE_S
                exchange.deadlines.add(self.deadline, self)

    def expire(self) -> None:
        """The operation's deadline passed: cancel the handler, and if it will not end, go on without it."""
        if not self.handling:
            return
        if self.cause is None:
            self.interrupt("TIMEOUT")
        elif not self.settled and self.on_stuck is not None:
            self.on_stuck(self)


async def run_handler(call: Call) -> OperationResult:
    """Run the handler of an allowed call until it returns, raises, or is cancelled; never raises itself."""
    operation, ctx, envelope = call.operation, call.ctx, call.envelope
    assert operation is not None and ctx is not None
    exchange = envelope.exchange
    tracer = exchange.tracer
    structlog.contextvars.bind_contextvars(
        trace_id=envelope.trace or tracer.trace_id(envelope.number),
        msg_id=tracer.msg_id(envelope.number),
        run_id=call.run_id,
        operation=call.name,
        decision_id=call.decision_id,
    )
    exchange.deadlines.add(call.deadline, call)
    call.handling = True
    try:
        if operation.is_async:
            value = await operation.handler(ctx)
        else:
            assert call.threads is not None
            call.thread = call.threads.run(partial(operation.handler, ctx))
            # The thread cannot be cancelled: the wait for it can.
            value = await asyncio.shield(call.thread)
    except asyncio.CancelledError:
        return _cancelled(call)
    except BaseException as error:  # noqa: BLE001  a handler is foreign code: its failure is an outcome, recorded
        if call.cause is not None:
            return _cancelled(call)
        return _raised(call, error)
    finally:
        call.handling = False
        exchange.deadlines.discard(call.deadline, call)
    if call.cause is not None:
        return _cancelled(call)
    return _returned(call, value)


def _cancelled(call: Call) -> OperationResult:
    task = call.task
    asked = task is not None and task.cancelling() > 0
    if task is not None:
        while task.cancelling() > 0:
            task.uncancel()
    effect = "what it did before that may have taken effect"
    if call.thread is not None and not call.thread.done():
        effect = "its thread cannot be cancelled and keeps its slot until it ends: what it does may take effect"
    match call.cause:
        case "TIMEOUT":
            assert call.operation is not None
            allowed = min(call.operation.timeout_s, call.request.timeout_s)
            return OperationResult.fail(
                f"operation {call.name!r} did not end within {allowed:g} s and was cancelled: {effect}", "TIMEOUT"
            )
        case None if not asked:
            return OperationResult.fail(
                f"the handler of {call.name!r} raised CancelledError", "HANDLER_EXCEPTION:CancelledError"
            )
        case _:
            return OperationResult.fail(
                f"operation {call.name!r} was cancelled because the Spine stopped or its registry restarted: {effect}",
                "INTERRUPTED",
            )


def _raised(call: Call, error: BaseException) -> OperationResult:
    message = describe(error)
    if call.accepted is not None:
        message = call.accepted.scrub(message)
    return OperationResult.fail(message, f"HANDLER_EXCEPTION:{type(error).__name__}")


def _returned(call: Call, value: object) -> OperationResult:
    if value is None:
        return OperationResult(True, {})
    if isinstance(value, Mapping):
        return OperationResult(True, value)
    try:
        if isinstance(value, BaseModel):
            return OperationResult(True, value.model_dump())
    except Exception as error:  # noqa: BLE001  the model is foreign code, as its handler is
        return _raised(call, error)
    if inspect.iscoroutine(value):
        value.close()
    problem = f"returned {type(value).__name__}: it must return a mapping, a pydantic model or an OperationResult"
    if isinstance(value, OperationResult):
        wrong = _wrong_field(value)
        if wrong is None:
            if call.accepted is not None and call.accepted.secrets:
                scrub = call.accepted.scrub
                return replace(
                    value,
                    error=value.error and scrub(value.error),
                    error_code=value.error_code and scrub(value.error_code),
                )
            return value
        problem = f"returned an OperationResult whose {wrong}"
    return OperationResult.fail(f"the handler of {call.name!r} {problem}", "HANDLER_EXCEPTION:TypeError")


def _wrong_field(result: OperationResult) -> str | None:
    for name in ("error", "error_code"):
        value = getattr(result, name)
        if value is not None and not isinstance(value, str):
            return f"{name} is {type(value).__name__}, not text"
    if not isinstance(result.success, bool):
        return f"success is {type(result.success).__name__}, not true or false"
    for name in ("data", "metadata"):
        value = getattr(result, name)
        if value is not None and not isinstance(value, Mapping):
            return f"{name} is {type(value).__name__}, not a mapping"
    return None
