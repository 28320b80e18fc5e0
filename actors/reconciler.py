"""Keeps the runtime audit contract: judges a run's promises on demand, and every run's when its time is over.

Two processes on one database may judge the same run: the record names the row it replaces, so that one of them stands,
and whoever was overtaken, by a verdict or by a report, judges again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from actors.judged import Overtaken
from actors.recorder import Recorder
from actors.rows import ContractRows
from actors.verdicts import judge
from spine.explain.contract import read_contract
from spine.governance.contract import ContractError, ReconcileRun, Reconciliation
from spine.governance.params import id_problem
from spine.governance.units import Committed, GuardFailed
from spine.kernel.errors import JournalBroken, JournalError, JournalUnavailable
from spine.kernel.exchange import Exchange
from spine.kernel.messages import Envelope
from spine.kernel.tasks import Tasks

SWEEP_S = 1.0
PAGE = 100


class DueContract(Protocol):
    """A run whose contract is due."""

    @property
    def run_id(self) -> str: ...

    @property
    def due_at(self) -> int: ...


class Contracts(ContractRows, Protocol):
    """Where contracts are found."""

    async def due_contracts(
        self, before_us: int, limit: int, *, after: tuple[int, str] | None
    ) -> Sequence[DueContract]:
        """The first contracts due before that time (unix microseconds), behind moment and run id of ``after``."""
        ...


class Reconciler:
    """Reads, judges, and has the verdict recorded like everything else: as a unit through the spine mailbox."""

    def __init__(self, exchange: Exchange, source: Contracts, recorder: Recorder) -> None:
        self._exchange = exchange
        self._source = source
        self._recorder = recorder

    async def keep(self, tasks: Tasks) -> None:
        """Sweep every ``SWEEP_S`` seconds until cancelled, for the first time when so much has passed."""
        clock = self._exchange.clock
        await clock.sleep_until(clock.monotonic() + SWEEP_S)
        await tasks.every(SWEEP_S, self.sweep, "contract sweep", clock)

    async def sweep(self) -> None:
        """Judge every contract whose moment is over, the oldest first."""
        now = self._exchange.clock.time_us()
        after: tuple[int, str] | None = None
        try:
            while page := await self._source.due_contracts(now, PAGE, after=after):
                for due in page:
                    await self._swept(due.run_id)
                after = (page[-1].due_at, page[-1].run_id)
        except JournalError as error:
            self._exchange.tracer.fault("spine.contract.unswept", exc=error)

    async def _swept(self, run_id: str) -> None:
        try:
            await self._judge(run_id, None)
        except (ContractError, JournalBroken) as error:
            # Only a journal that was tampered with has a contract without the start of its run, or one out of place.
            self._exchange.tracer.fault("spine.contract.unreadable", exc=error, run_id=run_id)

    async def reconcile(self, envelope: Envelope, request: ReconcileRun) -> Reconciliation:
        """The verdict now; raises ``ContractError`` for a run that does not exist, ``JournalError``."""
        if problem := id_problem("run_id", request.run_id):
            raise ContractError("INVALID_PARAMS", problem)
        return await self._judge(request.run_id, envelope)

    async def _judge(self, run_id: str, parent: Envelope | None) -> Reconciliation:
        overtaken = Overtaken(run_id)
        while True:
            rows = await self._source.contract_rows(run_id)
            contract = read_contract(rows)
            if contract is None:
                raise ContractError(
                    "UNKNOWN_RUN", f"run {run_id!r} was never started: `spine runs` lists those there are"
                )
            found, verdict = judge(contract, self._exchange.clock.time_us())
            if verdict is None:
                return found
            outcome = await self._recorder.commit([verdict], run_id=run_id, parent=parent)
            if isinstance(outcome, Committed):
                return found
            if not (isinstance(outcome, GuardFailed) and outcome.of_verdict):
                raise JournalUnavailable(
                    f"the verdict over the contract of run {run_id!r} was not recorded: {outcome}; free the journal's "
                    "storage and ask again"
                )
            overtaken.by(rows)
