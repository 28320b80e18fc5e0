"""Takeover of transactions: what a dead process or a crashed coordinator left in flight is claimed and gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from actors.completion import Plan
from actors.recorder import Recorder
from actors.reload import KINDS, reload
from actors.rows import TransactionRow, Transactions
from spine.governance.failpoints import CLAIM, Failpoint
from spine.governance.transactions import DomainClass, TxState
from spine.governance.units import Committed, Record
from spine.kernel.errors import SpineError
from spine.kernel.exchange import Exchange
from spine.kernel.restart import backoff
from spine.kernel.tasks import Tasks
from spine.parts import Part

TICK_S = 1.0
# What this Spine has to claim again and again waits in between: so many ticks at most.
PAUSE_MOST_TICKS = 30
AT_ONCE = 16


class StrandedSource(Transactions, Protocol):
    """Where the transactions that nobody drives are found."""

    async def stranded(self, instances_dead_before_us: int, own: str) -> Sequence[TransactionRow]:
        """The transactions in flight whose process is dead or is ``own``."""
        ...

    async def unended(self) -> Mapping[str, int]:
        """How many transactions are in which state that is not final."""
        ...


class Takeover:
    """Claims stranded transactions, each under a new fencing token, and hands their plans to ``drive``."""

    def __init__(
        self,
        exchange: Exchange,
        recorder: Recorder,
        source: StrandedSource,
        parts: Sequence[Part],
        *,
        instance: str,
        failpoint: Failpoint,
        unended: dict[str, int],
        driven: Callable[[str], bool],
        drive: Callable[[Plan], Awaitable[None]],
    ) -> None:
        self._exchange = exchange
        self._recorder = recorder
        self._source = source
        self._parts = parts
        self._outside = any(part.cls is DomainClass.EXTERNAL for part in parts)
        self._instance = instance
        self._failpoint = failpoint
        self._driven = driven
        self._drive = drive
        # Those that are being gone on with, and those that never will be here.
        self._known: set[str] = set()
        self._gate = asyncio.Semaphore(AT_ONCE)
        # How often this Spine has claimed a transaction that is still in flight, and when it does so again.
        self._claims: dict[str, tuple[int, float]] = {}
        self._unended = unended
        self._stopping = False

    def interrupt(self) -> None:
        """The Spine stops: it claims nothing more, least of all what it has just given up itself."""
        self._stopping = True

    async def keep(self, tasks: Tasks) -> None:
        """Look for stranded transactions every ``TICK_S`` seconds until cancelled."""
        await tasks.every(TICK_S, partial(self._look, tasks), "takeover", self._exchange.clock)

    async def _look(self, tasks: Tasks) -> None:
        """Go on with each in a task of its own: one whose domain hangs holds up no other."""
        try:
            found = await self._source.unended()
            self._unended.clear()
            self._unended.update(found)
            if not found or not self._outside:
                return
            stranded = await self._source.stranded(self._exchange.clock.time_us(), self._instance)
            self._claims = {row.tx_id: self._claims[row.tx_id] for row in stranded if row.tx_id in self._claims}
            for row in stranded:
                if not (self._stopping or self._driven(row.tx_id) or row.tx_id in self._known or self._waits(row)):
                    tasks.spawn(self._resume(row), f"takeover {row.tx_id}")
                    self._known.add(row.tx_id)
        except SpineError as error:
            # No reading, or no room for another task: the next look finds them again.
            self._exchange.tracer.fault("spine.takeover.failed", exc=error)

    def _waits(self, row: TransactionRow) -> bool:
        """Whether it was claimed here a moment ago, in vain."""
        return self._exchange.clock.monotonic() < self._claims.get(row.tx_id, (0, 0.0))[1]

    async def _resume(self, row: TransactionRow) -> None:
        strange = False
        try:
            async with self._gate:
                strange = self._strange(await self._reloaded(row))
                plan = None if strange or self._stopping else await self._claimed(row)
            if plan is not None:
                await self._drive(plan)
        finally:
            if not strange:
                self._known.discard(row.tx_id)

    async def _claimed(self, row: TransactionRow) -> Plan | None:
        """The transaction as it stands once it is ours; ``None`` when another process was faster."""
        if not await self._claim(row):
            return None
        # Read again: whoever had it could still write until the claim ...
        standing = await self._source.transaction_by_id(row.tx_id)
        assert standing is not None
        plan = await self._reloaded(standing)
        # ... and whoever finds this process too slow may have claimed it since.
        return plan if (plan.epoch, standing.instance) == (row.epoch + 1, self._instance) else None

    async def _reloaded(self, row: TransactionRow) -> Plan:
        return reload(await self._source.run_rows(row.run_id, *KINDS), row, self._parts, self._instance)

    def _strange(self, plan: Plan) -> bool:
        """Whether a domain takes part that only another application can ask."""
        # Who goes on needs every domain; who only undoes, those that can be undone.
        needed = [step for step in plan.steps if step.external or plan.state is TxState.EXECUTING]
        strange = [step.name for step in needed if step.domain is None]
        if strange:
            self._exchange.tracer.fault(
                "spine.transaction.strange",
                tx_id=plan.tx_id,
                run_id=plan.request.run_id,
                domains=strange,
                remedy="start a Spine that declares these domains: it goes on with the transaction",
            )
        return bool(strange)

    async def _claim(self, row: TransactionRow) -> bool:
        """Take the transaction over under a new fencing token; ``False`` when another process was faster."""
        await self._failpoint(f"{CLAIM}.before")
        facts: dict[str, Any] = {"tx_id": row.tx_id, "run_id": row.run_id, "epoch": row.epoch + 1}
        fields = {**facts, "tenant_id": row.tenant_id, "instance": self._instance, "previous": row.instance}
        claimed = Record("tx.claimed", self._exchange.clock.time_us(), fields)
        if not isinstance(await self._recorder.commit([claimed], run_id=row.run_id), Committed):
            return False
        claims = self._claims.get(row.tx_id, (0, 0.0))[0] + 1
        pause = backoff(claims, first_s=TICK_S, most_s=PAUSE_MOST_TICKS * TICK_S, jitter=0.0)
        self._claims[row.tx_id] = (claims, self._exchange.clock.monotonic() + pause)
        await self._failpoint(f"{CLAIM}.after")
        self._exchange.tracer.life("spine.transaction.claimed", **facts, state=row.state)
        return True
