"""Housekeeping of a process: its lease, the decisions that dead processes left open, and outcomes not yet recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import anyio

from actors.audit import COMMIT_S, NAME, KeepLease
from actors.recorder import Recorder
from actors.records import interrupted_record
from spine.governance.units import Committed, GuardFailed, Record
from spine.kernel.errors import JournalError, SpineError
from spine.kernel.exchange import Exchange
from spine.kernel.messages import Lane

LEASE_S = 10.0
TICK_S = 1.0
SWEEP_TICKS = 3
UNRECORDED_MOST = 10_000


class OpenDecision(Protocol):
    """A decision without an outcome."""

    @property
    def decision_id(self) -> str: ...

    @property
    def operation(self) -> str: ...

    @property
    def instance(self) -> str: ...

    @property
    def seq(self) -> int: ...


class OpenDecisions(Protocol):
    """Where the decisions of dead processes are found, and how they were closed."""

    async def open_decisions(self, instances_dead_before_us: int) -> Sequence[OpenDecision]:
        """Decisions without an outcome whose process held no lease at that time."""
        ...

    async def body_at(self, seq: int) -> dict[str, Any]:
        """The body of a journal row."""
        ...

    async def outcome_of(self, decision_id: str, run_id: str | None) -> dict[str, Any] | None:
        """The body of the decision's outcome, or ``None``."""
        ...


class Recovery:
    """Outlives the registry's incarnations: what is unrecorded is not forgotten in a restart."""

    def __init__(self, exchange: Exchange, recorder: Recorder, source: OpenDecisions, instance: str) -> None:
        self._exchange = exchange
        self._recorder = recorder
        self._source = source
        self._instance = instance
        self.unrecorded: dict[str, Record] = {}
        self.interrupted = 0
        self._hurry = anyio.Event()

    def remember(self, outcome: Record) -> None:
        """Keep an outcome that could not be recorded, to record it when the journal takes writes again."""
        if len(self.unrecorded) < UNRECORDED_MOST:
            self.unrecorded[outcome.fields["decision_id"]] = outcome

    async def enlist(self) -> None:
        """Take this process's lease."""
        message = KeepLease(self._instance, LEASE_S)
        await self._exchange.ask(message, NAME, timeout_s=COMMIT_S, sender="registry", lane=Lane.CONTROL)

    def look_again(self) -> None:
        """Have the governance state looked at now instead of at the next tick."""
        self._hurry.set()

    async def keep(self, watch: Callable[[], Awaitable[None]]) -> None:
        """Keep house until cancelled; ``watch`` looks after the governance state."""
        tick = 0
        while True:
            try:
                if tick % SWEEP_TICKS == 0:
                    await self.sweep()
                await watch()
            except SpineError as error:
                self._exchange.tracer.fault("spine.housekeeping.failed", exc=error)
            tick += 1
            self._hurry = anyio.Event()
            async with anyio.create_task_group() as waits:
                waits.start_soon(self._tick, waits.cancel_scope)
                await self._hurry.wait()
                waits.cancel_scope.cancel()

    async def _tick(self, scope: anyio.CancelScope) -> None:
        clock = self._exchange.clock
        await clock.sleep_until(clock.monotonic() + TICK_S)
        scope.cancel()

    async def sweep(self) -> None:
        """Record INTERRUPTED for what dead processes left open, and what this one could not record before."""
        clock = self._exchange.clock
        for decision_id, outcome in list(self.unrecorded.items()):
            ended = await self._recorder.commit([outcome], run_id=outcome.fields["run_id"])
            if not isinstance(ended, Committed) and not (isinstance(ended, GuardFailed) and await self._late(outcome)):
                break
            del self.unrecorded[decision_id]
        try:
            for left in await self._source.open_decisions(clock.time_us()):
                if left.instance != self._instance:
                    await self._close(left)
        except JournalError as error:
            self._exchange.tracer.fault("spine.recovery.unreadable", exc=error)

    async def _late(self, outcome: Record) -> bool:
        """Its decision is not open: closed by us after all, by who took us for dead, or never recorded; is all told?"""
        try:
            closed = await self._source.outcome_of(outcome.fields["decision_id"], outcome.fields["run_id"])
        except JournalError as error:
            self._exchange.tracer.fault("spine.recovery.unreadable", exc=error)
            return False
        if closed is None or closed["instance"] == self._instance:
            return True
        self._exchange.tracer.fault("spine.outcome.late", decision_id=outcome.fields["decision_id"])
        late = Record("outcome.late", outcome.at, outcome.fields)
        return isinstance(await self._recorder.commit([late], run_id=outcome.fields["run_id"]), Committed)

    async def _close(self, left: OpenDecision) -> None:
        decision = await self._source.body_at(left.seq)
        record = interrupted_record(decision, at=self._exchange.clock.time_us(), instance=self._instance)
        if isinstance(await self._recorder.commit([record], run_id=record.fields["run_id"]), Committed):
            self.interrupted += 1
            self._exchange.tracer.fault(
                "spine.operation.interrupted", operation=left.operation, decision_id=left.decision_id
            )
