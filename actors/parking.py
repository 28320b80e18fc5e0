"""Parked transactions in an operator's hands: resolved on evidence, or tried again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from actors import transaction_records as records
from actors.completion import Plan
from actors.judged import judged
from actors.recorder import Recorder
from actors.records import text
from actors.reload import KINDS, reload
from actors.rows import ContractRows, Transactions
from spine.governance.failpoints import Failpoint, of_tx
from spine.governance.parking import ResolveTransaction, RetryTransaction, validate
from spine.governance.transactions import TxState
from spine.governance.units import CommitOutcome, Committed, GuardFailed, Record
from spine.kernel.errors import ConfigurationError, JournalUnavailable
from spine.kernel.exchange import Exchange
from spine.kernel.messages import Envelope
from spine.parts import Part


class Source(Transactions, ContractRows, Protocol):
    """The journal as parking reads it."""


class Parking:
    """Moves parked transactions on; every move is journaled with who and why."""

    def __init__(
        self,
        exchange: Exchange,
        recorder: Recorder,
        source: Source,
        parts: Sequence[Part],
        *,
        instance: str,
        failpoint: Failpoint,
    ) -> None:
        self._exchange = exchange
        self._recorder = recorder
        self._source = source
        self._parts = parts
        self._instance = instance
        self._failpoint = failpoint

    async def resolve(self, envelope: Envelope, request: ResolveTransaction) -> dict[str, Any]:
        """End a parked transaction that was undone by hand. Raises ConfigurationError or JournalError."""
        plan = await self._parked(request)
        clock = self._exchange.clock
        rows = records.resolved(
            plan, clock.time_us(), evidence=request.evidence, reason=request.reason, actor=request.actor
        )
        run_id = plan.request.run_id
        commit = partial(self._recorder.commit, run_id=run_id, parent=envelope)
        await self._failpoint(f"{of_tx('resolve')}.before")
        await self._moved(plan, "resolve", await judged(run_id, rows, self._source, commit, clock.time_us))
        return _told(plan)

    async def retry(self, envelope: Envelope, request: RetryTransaction) -> dict[str, Any]:
        """Have the rollbacks tried again, by whoever has the domains. Raises ConfigurationError, JournalUnavailable."""
        plan = await self._parked(request)
        plan.epoch += 1
        fields = {
            **records.identity(plan),
            "state": TxState.COMPENSATING.value,
            # Nobody's until it is claimed: this Spine may live on and not have the domains.
            "instance": "",
            "reason": text(request.reason),
            "actor": text(request.actor),
        }
        plan.state = TxState.COMPENSATING
        retried = Record("tx.retried", self._exchange.clock.time_us(), fields)
        await self._failpoint(f"{of_tx('retry')}.before")
        outcome = await self._recorder.commit([retried], run_id=plan.request.run_id, parent=envelope)
        await self._moved(plan, "retry", outcome)
        return _told(plan)

    async def _parked(self, request: ResolveTransaction | RetryTransaction) -> Plan:
        validate(request)
        row = await self._source.transaction_by_id(request.tx_id)
        if row is None:
            raise ConfigurationError(f"there is no transaction {request.tx_id!r}: `spine parked` lists those that wait")
        if row.state != TxState.PARKED:
            raise ConfigurationError(
                f"transaction {request.tx_id} is {row.state}, not PARKED: see `spine why {row.run_id}`"
            )
        return reload(await self._source.run_rows(row.run_id, *KINDS), row, self._parts, self._instance)

    async def _moved(self, plan: Plan, move: str, outcome: CommitOutcome) -> None:
        """Raise when the move was not committed."""
        match outcome:
            case Committed():
                await self._failpoint(f"{of_tx(move)}.after")
            case GuardFailed() if not outcome.of_record:
                raise ConfigurationError(
                    f"transaction {plan.tx_id} was moved on by somebody else: see `spine why {plan.request.run_id}`"
                )
            case _:
                raise JournalUnavailable(f"transaction {plan.tx_id} was not moved, it is not recorded: {outcome}")


def _told(plan: Plan) -> dict[str, Any]:
    domains = [
        {"name": step.name, "class": step.cls.value, "state": step.state.value, "error": step.error}
        for step in plan.steps
    ]
    return {"tx_id": plan.tx_id, "run_id": plan.request.run_id, "state": plan.state.value, "domains": domains}
