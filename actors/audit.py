"""The audit actor: the journal's only writer in its process; its mailbox is the group-commit queue.

It understands ``Append`` (commit a unit of work), ``KeepLease``, and ``ReconcileRun`` (judge a run's contract), which
continues in an owned task as the sweep over all contracts does. It takes whatever waits, has it written in one SQL
transaction, and replies after COMMIT. Storage errors are replies, not crashes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

from spine.governance.contract import Overall, ReconcileRun, Reconciliation
from spine.governance.units import CommitOutcome, Committed, StorageFailed, Unit
from spine.kernel.actor import Actor
from spine.kernel.errors import ActorCrashed, JournalError
from spine.kernel.exchange import Exchange
from spine.kernel.messages import Envelope, Request, Stop
from spine.kernel.tasks import Tasks

NAME = "audit"
BATCH_UNITS = 512
COMMIT_S = 30.0
# So many runs are judged on demand at a time.
RECONCILING_MOST = 1024


@dataclass(slots=True)
class Append(Request[CommitOutcome]):
    """Commit this unit; ``run_id`` is its correlation in logs."""

    unit: Unit
    run_id: str | None = None


@dataclass(slots=True)
class KeepLease(Request[None]):
    """Say that this process lives, for ``lease_s`` seconds after it last could."""

    instance: str
    lease_s: float


Message = Append | KeepLease | ReconcileRun | Stop


class Writer(Protocol):
    """What the audit actor needs of the journal's writer."""

    async def commit(self, units: Sequence[Unit]) -> list[CommitOutcome]:
        """Write the units in one transaction; an outcome for each."""
        ...

    async def find_units(self, ids: Sequence[str], since_seq: int) -> dict[str, Committed]:
        """Which of the units are in the journal behind row ``since_seq``."""
        ...

    async def keep_lease(self, instance: str, lease_s: float, now_us: Callable[[], int]) -> None:
        """Write the lease row, which is not journaled, again and again."""
        ...

    async def release_lease(self) -> None:
        """Give the lease back: what is unfinished may be taken over at once."""
        ...


class Reader(Protocol):
    """What the audit actor needs of the journal's reader."""

    async def close(self) -> None:
        """Give its connections back; the next reading opens new ones."""
        ...


class Contracts(Protocol):
    """Who keeps the runs' contracts."""

    async def keep(self, tasks: Tasks) -> None:
        """Judge what is due, until cancelled."""
        ...

    async def reconcile(self, envelope: Envelope, request: ReconcileRun) -> Reconciliation:
        """Judge one run now."""
        ...


@dataclass(slots=True)
class Progress:
    """How far the writing has come; outlives the actor's incarnations."""

    last_seq: int = 0
    batches: int = 0
    units: int = 0
    storage_error: str | None = None
    verdicts: dict[str, int] = field(default_factory=lambda: {overall.value.lower(): 0 for overall in Overall})

    def committed(self, unit: Unit) -> None:
        """Count the verdicts over contracts that the unit holds."""
        for record in unit.records:
            if record.kind == "contract.reconciled" and record.fields["overall"] != record.fields["was"]:
                verdict = record.fields["overall"].lower()
                self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """For health."""
        return {
            "available": self.storage_error is None,
            "error": self.storage_error,
            "last_seq": self.last_seq,
            "batches": self.batches,
            "units": self.units,
        }


class Audit(Actor):
    """Group commit as an actor."""

    name = NAME

    def __init__(
        self, exchange: Exchange, writer: Writer, reader: Reader, contracts: Contracts, progress: Progress
    ) -> None:
        super().__init__(exchange)
        self._contracts = contracts
        self._tasks = Tasks(NAME, limit=RECONCILING_MOST, on_crash=self.task_crashed)
        self._reader = reader
        self._writer = writer
        self._progress = progress

    def __repr__(self) -> str:
        return f"Audit({self._progress})"

    async def start(self) -> None:
        """Begin to look after what is due."""
        self._tasks.spawn(self._contracts.keep(self._tasks), "contracts")

    async def stop(self) -> bool:
        """Judge no more."""
        return await self._tasks.cancel(0.5)

    async def resume(self, taken: Sequence[Envelope], crash: ActorCrashed | None) -> None:
        """Answer what the crashed incarnation had taken from the journal itself: written or not."""
        waiting = [e for e in taken if isinstance(e.payload, Append) and not e.done]
        found = await self._written([e.payload.unit.id for e in waiting])
        for envelope in waiting:
            if (committed := found.get(envelope.payload.unit.id)) is not None:
                envelope.reply(committed)
        await super().resume([e for e in taken if not e.done], crash)

    async def _written(self, ids: list[str]) -> dict[str, Committed]:
        return await self._writer.find_units(ids, self._progress.last_seq) if ids else {}

    async def run(self) -> None:
        """Commit batch after batch until stopped; what waits at the stop is committed first."""
        stopping = False
        while True:
            batch: list[Envelope] = []
            while len(batch) < BATCH_UNITS and (envelope := self.mailbox.take()) is not None:
                if envelope.done:
                    continue
                envelope.holder = self.name
                message: Message = envelope.payload
                match message:
                    case Append():
                        batch.append(envelope)
                    case KeepLease():
                        await self._keep(envelope, message)
                    case ReconcileRun():
                        self._tasks.answer(envelope, self._contracts.reconcile(envelope, message))
                    case Stop():
                        stopping = True
                        self.exchange.handled(envelope)
                    case _:
                        assert_never(message)
            if batch:
                await self._commit(batch)
            elif stopping:
                await self._release()
                return
            else:
                await self.mailbox.wait()

    async def _commit(self, batch: list[Envelope]) -> None:
        if self.exchange.tracer.messages:
            began = self.exchange.clock.monotonic()
            for envelope in batch:
                self.traced(envelope, began)
        outcomes = await self._writer.commit([envelope.payload.unit for envelope in batch])
        progress = self._progress
        progress.batches += 1
        progress.units += len(batch)
        progress.last_seq = max(
            [progress.last_seq, *(outcome.last for outcome in outcomes if isinstance(outcome, Committed))]
        )
        failed = next((outcome for outcome in outcomes if isinstance(outcome, StorageFailed)), None)
        if failed is not None and "readonly" in failed.error:
            # SQLite shares what it believes of a file among a process's connections: while one of them stays open, a
            # file that was read-only stays so for the writer too.
            await self._reader.close()
        self._storage(failed)
        for envelope, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Committed):
                progress.committed(envelope.payload.unit)
            if envelope.reply_to is None:
                self.exchange.handled(envelope)
            else:
                envelope.reply(outcome)

    def _storage(self, failed: StorageFailed | None) -> None:
        error = None if failed is None else failed.error
        if error is not None and self._progress.storage_error is None:
            self.exchange.tracer.fault("spine.journal.unavailable", error=error)
        elif error is None and self._progress.storage_error is not None:
            self.exchange.tracer.life("spine.journal.available")
        self._progress.storage_error = error

    async def _keep(self, envelope: Envelope, lease: KeepLease) -> None:
        try:
            await self._writer.keep_lease(lease.instance, lease.lease_s, self.exchange.clock.time_us)
        except JournalError as error:
            envelope.fail(error)
            return
        if envelope.reply_to is None:
            self.exchange.handled(envelope)
        else:
            envelope.reply(None)

    async def _release(self) -> None:
        try:
            await self._writer.release_lease()
        except JournalError as error:
            self.exchange.tracer.fault("spine.lease.kept", exc=error)
