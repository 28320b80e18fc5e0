"""How an actor has something recorded: a unit of work sent to the audit actor through the spine mailbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from actors.audit import COMMIT_S, NAME, Append
from spine.governance.units import CommitOutcome, Committed, GuardFailed, Record, StaleEpoch, StorageFailed, Unit, Write
from spine.kernel.errors import SpineError
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope, Reply

# Of what is buffered, at most this many rows may be lost with the process ...
BUFFERED_ROWS = 1000
# ... and at most this long: a buffer is sent when it holds so many rows or is so old (seconds).
BUFFER_ROWS = 200
BUFFER_S = 0.01

OnLost = Callable[[Record, CommitOutcome], None]


class Recorder:
    """Sends units for one actor; gathers what is buffered into one unit, and counts what is not yet durable."""

    def __init__(
        self,
        exchange: Exchange,
        ids: Ids,
        sender: str,
        on_lost: OnLost | None = None,
        on_stale: Callable[[], None] | None = None,
    ) -> None:
        self._exchange = exchange
        self._ids = ids
        self._sender = sender
        self._on_lost = on_lost
        self._on_stale = on_stale
        self._idle = asyncio.Event()
        self._idle.set()
        self._pending: list[Record] = []
        self._epoch: int | None = None
        self._due = 0.0
        self.buffered_rows = 0
        self.buffered_lost = 0

    async def commit(
        self,
        records: Sequence[Record],
        *,
        epoch: int | None = None,
        writes: Sequence[Write] = (),
        run_id: str | None = None,
        parent: Envelope | None = None,
        unit_id: str = "",
    ) -> CommitOutcome:
        """Have the records and writes committed together; any failure to learn the end is ``StorageFailed``."""
        if self._pending:
            # What was recorded earlier stands earlier in the journal.
            self._send()
        unit = Unit(unit_id or self._ids.uuid(), records, writes, epoch)
        exchange = self._exchange
        try:
            envelope = exchange.post(Append(unit, run_id), NAME, timeout_s=COMMIT_S, sender=self._sender, parent=parent)
        except SpineError as error:
            return StorageFailed(str(error))
        try:
            outcome: CommitOutcome = await exchange.answer(envelope)
        except SpineError as error:
            return StorageFailed(str(error), unknown=True)
        return outcome

    @property
    def full(self) -> bool:
        """Whether so much is buffered that the next unit must wait for its commit."""
        return self.buffered_rows >= BUFFERED_ROWS

    def buffer(self, record: Record, epoch: int | None = None) -> None:
        """Have the record committed soon, without waiting; what is lost is told to ``on_lost``.

        ``epoch`` is the governance epoch of a decision: where it has passed meanwhile, the record says so.
        """
        pending = self._pending
        if epoch is not None and (self._epoch is None or epoch < self._epoch):
            self._epoch = epoch
        pending.append(record)
        self.buffered_rows += 1
        if len(pending) >= BUFFER_ROWS:
            self._send()
        elif len(pending) == 1:
            self._idle.clear()
            self._due = self._exchange.clock.monotonic() + BUFFER_S
            self._exchange.deadlines.add(self._due, self)

    def expire(self) -> None:
        """The oldest buffered record has waited long enough."""
        if self._pending:
            self._send()

    async def flushed(self) -> None:
        """Return once nothing is buffered any more."""
        if self._pending:
            self._send()
        await self._idle.wait()

    def _send(self) -> None:
        records, self._pending = self._pending, []
        epoch, self._epoch = self._epoch, None
        self._idle.clear()
        self._exchange.deadlines.discard(self._due, self)
        if records:
            self._send_unit(records, epoch)

    def _send_unit(self, records: list[Record], epoch: int | None = None) -> None:
        message = Append(Unit(self._ids.uuid(), records, (), epoch))
        landed = Reply(partial(self._landed, records))
        try:
            self._exchange.post(message, NAME, timeout_s=COMMIT_S, sender=self._sender, reply_to=landed)
        except SpineError as error:
            self._lost(records, StorageFailed(str(error)))

    def _landed(self, records: list[Record], outcome: CommitOutcome | None, error: BaseException | None) -> None:
        match outcome:
            case Committed():
                self._settle(len(records))
            case StaleEpoch():
                self._late(records, outcome.epoch)
            case GuardFailed() if len(records) > 1:
                # One bad row must not take its neighbours with it.
                for record in records:
                    self._send_unit([record])
            case None:
                self._lost(records, StorageFailed(str(error), unknown=True))
            case _:
                self._lost(records, outcome)

    def _late(self, records: list[Record], epoch: int) -> None:
        """The state was switched behind these decisions' back: their operations ran, so they are recorded, marked."""
        for record in records:
            if record.fields.get("epoch", epoch) < epoch:
                record.fields["late"] = True
        if self._on_stale is not None:
            self._on_stale()
        self._send_unit(records)

    def _lost(self, records: list[Record], outcome: CommitOutcome) -> None:
        self.buffered_lost += len(records)
        self._exchange.tracer.fault("spine.journal.buffered_lost", rows=len(records), outcome=repr(outcome))
        if self._on_lost is not None:
            for record in records:
                self._on_lost(record, outcome)
        self._settle(len(records))

    def _settle(self, rows: int) -> None:
        self.buffered_rows -= rows
        if self.buffered_rows == 0:
            self._idle.set()
