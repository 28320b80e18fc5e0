"""The moves of one transaction, each committed before what follows from it; a driver that lost it moves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from actors import transaction_records as records
from actors.completion import Plan, Step
from actors.effect_calls import EffectCalls
from actors.judged import Overtaken, judged
from actors.recorder import Recorder
from actors.rows import ContractRows
from actors.transaction_log import TransactionLog
from actors.verdicts import with_verdict
from spine.governance.failpoints import BEGIN, Failpoint, of_step, of_tx
from spine.governance.units import CommitOutcome, Committed, GuardFailed, Record, Write
from spine.kernel.errors import SpineError
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope
from spine.settings import Retry


class Lost(SpineError):
    """The driver goes no further: another one has the transaction, or the journal took no record; recovery goes on."""


@dataclass(slots=True)
class Driving:
    """What every driver of one coordinator works with."""

    exchange: Exchange
    ids: Ids
    recorder: Recorder
    calls: EffectCalls
    failpoint: Failpoint
    retry: Retry
    counts: dict[str, int]
    log: TransactionLog
    contracts: ContractRows


class Moves:
    """Has the moves of one transaction committed, told in the log, and its plan kept."""

    def __init__(self, driving: Driving, plan: Plan, cause: Envelope | None) -> None:
        self._own = driving
        self._plan = plan
        self._cause = cause
        self._overtaken = Overtaken(plan.request.run_id)

    async def begin(self) -> CommitOutcome:
        """Record the transaction with its plan; whoever else began it first keeps it."""
        plan = self._plan
        await self._pass([BEGIN], "before")
        outcome = await self._commit([*plan.start, records.begun(plan)], epoch=plan.governance_epoch)
        if isinstance(outcome, Committed):
            self._own.log.begun(self._cause, plan)
            await self._pass([BEGIN], "after")
        return outcome

    async def step(self, step: Step, move: str, rows: Sequence[Record]) -> None:
        """Have a step's move committed. Raises ``Lost``."""
        await self.write([of_step(move)], rows)
        self._own.log.moved(self._cause, self._plan, step, move)

    async def write(self, moments: Sequence[str], rows: Sequence[Record]) -> None:
        """Have moves committed. Raises ``Lost`` when the transaction is not ours any more."""
        if (failed := await self._written(moments, rows)) is not None:
            raise self._lost(moments, failed)

    async def end(self, move: str, rows: Sequence[Record]) -> None:
        """Have the last move of a transaction that did not commit recorded, whoever judges its run meanwhile.

        Raises ``Lost`` or JournalError.
        """
        plan, own = self._plan, self._own
        commit = partial(self._written, [of_tx(move)])
        failed = await judged(plan.request.run_id, rows, own.contracts, commit, own.exchange.clock.time_us)
        if failed is not None:
            raise self._lost([move], failed)

    async def read_contract(self) -> None:
        """Look up what the journal holds of the run's contract. Raises JournalError."""
        self._plan.rows = await self._own.contracts.contract_rows(self._plan.request.run_id)

    async def commit(self, rows: Sequence[Record], writes: Sequence[Write]) -> GuardFailed | None:
        """Have the commit point committed, with the verdict over the run's contract that it brings about.

        Gives back the guard of a domain's write that failed, or one ``of_verdict`` where somebody judged the run, or
        reported of it, since its contract was read. Raises ``Lost``; JournalBroken where reading again does not help.
        """
        known = self._plan.rows
        told = with_verdict(rows, known, at=self._own.exchange.clock.time_us())
        failed = await self._written([of_tx("commit")], told, writes)
        if failed is not None and failed.of_verdict:
            self._overtaken.by(known)
        return failed

    async def _written(
        self, moments: Sequence[str], rows: Sequence[Record], writes: Sequence[Write] = ()
    ) -> GuardFailed | None:
        """Have moves committed; gives back a guard that its caller may know how to mend."""
        await self._pass(moments, "before")
        outcome = await self._commit(rows, writes=writes)
        if isinstance(outcome, GuardFailed) and (outcome.of_write or outcome.of_verdict):
            return outcome
        if not isinstance(outcome, Committed):
            raise self._lost(moments, outcome)
        self._plan.stalled = 0
        await self._pass(moments, "after")
        return None

    def _lost(self, moments: Sequence[str], outcome: CommitOutcome) -> Lost:
        return Lost(f"transaction {self._plan.tx_id}: {moments[-1]} was not recorded: {outcome}")

    async def _pass(self, moments: Sequence[str], when: str) -> None:
        for moment in moments:
            await self._own.failpoint(f"{moment}.{when}")

    async def _commit(
        self, rows: Sequence[Record], *, epoch: int | None = None, writes: Sequence[Write] = ()
    ) -> CommitOutcome:
        return await self._own.recorder.commit(
            rows, writes=writes, epoch=epoch, run_id=self._plan.request.run_id, parent=self._cause
        )
