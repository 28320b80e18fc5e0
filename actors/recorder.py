"""How an actor has something recorded: a unit of work sent to the audit actor through the spine mailbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.audit import COMMIT_S, NAME, Append
from spine.governance.units import CommitOutcome, Committed, Record, StorageFailed, Unit, Write
from spine.kernel.errors import SpineError
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope

# Of what is buffered, at most this many rows may be lost with the process.
BUFFERED_ROWS = 1000


class Recorder:
    """Sends units for one actor and counts what is buffered but not yet durable."""

    def __init__(self, exchange: Exchange, ids: Ids, sender: str) -> None:
        self._exchange = exchange
        self._ids = ids
        self._sender = sender
        self._idle = asyncio.Event()
        self._idle.set()
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
    ) -> CommitOutcome:
        """Have the records and writes committed together; any failure to learn the end is ``StorageFailed``."""
        unit = Unit(self._ids.uuid(), records, writes, epoch)
        exchange = self._exchange
        try:
            outcome: CommitOutcome = await exchange.answer(
                exchange.post(Append(unit, run_id), NAME, timeout_s=COMMIT_S, sender=self._sender, parent=parent)
            )
        except SpineError as error:
            return StorageFailed(str(error), unknown=True)
        return outcome

    @property
    def full(self) -> bool:
        """Whether so much is buffered that the next unit must wait for its commit."""
        return self.buffered_rows >= BUFFERED_ROWS

    def buffer(
        self,
        records: Sequence[Record],
        *,
        run_id: str | None,
        parent: Envelope | None,
        on_lost: Callable[[CommitOutcome], None] | None = None,
    ) -> None:
        """Have the records committed without waiting; raises ``SpineError`` when even that is not taken."""
        unit = Unit(self._ids.uuid(), records)
        envelope = self._exchange.post(
            Append(unit, run_id), NAME, timeout_s=COMMIT_S, sender=self._sender, parent=parent
        )
        assert envelope.reply_to is not None
        rows = len(records)
        self.buffered_rows += rows
        self._idle.clear()

        def landed(future: asyncio.Future[CommitOutcome]) -> None:
            self.buffered_rows -= rows
            if self.buffered_rows == 0:
                self._idle.set()
            error = None if future.cancelled() else future.exception()
            outcome = StorageFailed(str(error), unknown=True) if error else future.result()
            if not isinstance(outcome, Committed):
                self.buffered_lost += rows
                self._exchange.tracer.fault("spine.journal.buffered_lost", rows=rows, run_id=run_id, outcome=repr(outcome))
                if on_lost is not None:
                    on_lost(outcome)

        envelope.reply_to.add_done_callback(landed)

    async def flushed(self) -> None:
        """Return once nothing is buffered any more."""
        await self._idle.wait()
