"""Reading the journal beside its writer: lookups by id, lists, and whether the rows behind an answer are intact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from spine.governance.contract import CONTRACT_KINDS
from spine.governance.transactions import TxState
from spine.journal.evidence import MAIN, ROW, Evidence, columns, row_of, run_of
from spine.journal.lease import alive, holds
from spine.journal.rows import (
    Counts,
    DueContract,
    GovernanceRow,
    IdempotencyRow,
    OpenDecision,
    ParkedRow,
    Row,
    RunRow,
    TransactionRow,
)
from spine.journal.statements import words
from spine.kernel.errors import JournalBroken

_LAST_CHARACTER: Final = "\U0010ffff"
_PAGE: Final = 500
_IN_FLIGHT: Final = f"state IN ({words(TxState.those_in_flight())})"
_UNENDED: Final = f"state IN ({words(TxState.unended())})"


class JournalReader(Evidence):
    """What may be asked of the journal; every method may raise JournalError."""

    async def governance(self) -> GovernanceRow:
        """The governance state as last committed, by whatever process."""
        found = await self._all(f"SELECT {columns(GovernanceRow)} FROM governance WHERE id = 1")
        if not found:
            raise JournalBroken(f"the journal at {self._target.name} has lost its governance row: run `spine verify`")
        return GovernanceRow(*found[0])

    async def run_rows(self, run_id: str, *kinds: str) -> list[Row]:
        """Every journal row of the run, in order; of these ``kinds`` if some are named."""
        of_kind = f" AND kind IN ({','.join('?' * len(kinds))})" if kinds else ""
        sql = f"SELECT {ROW} FROM journal WHERE run_id = ? AND {MAIN}{of_kind} ORDER BY seq"
        # All of a long run's rows are a scan; of some kinds there are few.
        read = self._all if kinds else self._scan
        return [row_of(values) for values in await read(sql, run_id, *kinds)]

    async def operation_counts(self, run_id: str, tenant_id: str) -> tuple[int, int, int]:
        """How many operations of the tenant's run were decided on, denied, and ended without success."""
        found = await self._all(
            f"SELECT kind, {self._false('allowed')}, {self._false('success')}, count(*) FROM journal "
            f"WHERE run_id = ? AND tenant_id = ? AND {MAIN} AND kind IN ('decision', 'outcome') GROUP BY 1, 2, 3",
            run_id,
            tenant_id,
        )
        decided = sum(count for kind, _, _, count in found if kind == "decision")
        denied = sum(count for kind, refused, _, count in found if kind == "decision" and refused)
        failed = sum(count for kind, _, unsuccessful, count in found if kind == "outcome" and unsuccessful)
        return decided, denied, failed

    def _false(self, name: str) -> str:
        """Whether that member of a body is false, in the database's own JSON."""
        if self._target.dialect == "sqlite":
            return f"json_extract(body, '$.{name}') = 0"
        return f"(body::json ->> '{name}') = 'false'"

    async def contract_rows(self, run_id: str) -> list[Row]:
        """The journal rows of the run that tell of its contract, in order."""
        return await self.run_rows(run_id, *CONTRACT_KINDS)

    async def due_contracts(
        self, before_us: int, limit: int, *, after: tuple[int, str] | None = None
    ) -> list[DueContract]:
        """Up to ``limit`` contracts due before that time (unix microseconds), the earliest first.

        ``after`` is the moment and run id to go on from.
        """
        where: list[str] = ["due_at < ?"]
        values: list[Any] = [before_us]
        if after is not None:
            where.append("(due_at, run_id) > (?, ?)")
            values += after
        found = await self._all(
            f"SELECT {columns(DueContract)} FROM contracts WHERE {' AND '.join(where)} ORDER BY due_at, run_id LIMIT ?",
            *values,
            limit,
        )
        return [DueContract(*values) for values in found]

    async def run_ids_like(self, prefix: str, limit: int = 10) -> list[str]:
        """Up to ``limit`` ids, sorted, of runs with journal rows that begin with ``prefix``."""
        found = await self._scan(
            "SELECT DISTINCT run_id FROM journal WHERE run_id >= ? AND run_id < ? ORDER BY run_id LIMIT ?",
            prefix,
            prefix + _LAST_CHARACTER,
            limit,
        )
        return [values[0] for values in found]

    async def runs(self, limit: int = 50, *, before: int | None = None, state: str | None = None) -> list[RunRow]:
        """Up to ``limit`` runs, last started first; ``before`` is the ``started_seq`` to go on from."""
        where: list[str] = ["1 = 1"]
        values: list[Any] = []
        if before is not None:
            where.append("started_seq < ?")
            values.append(before)
        if state is not None:
            where.append("state = ?")
            values.append(state)
        found = await self._scan(
            f"SELECT {columns(RunRow)} FROM runs WHERE {' AND '.join(where)} ORDER BY started_seq DESC LIMIT ?",
            *values,
            limit,
        )
        return [run_of(values) for values in found]

    async def idempotency(self, tenant_id: str, operation: str, key: str) -> IdempotencyRow | None:
        """What the key was claimed for, if it was."""
        found = await self._all(
            f"SELECT {columns(IdempotencyRow)} FROM idempotency WHERE tenant_id = ? AND operation = ? AND key = ?",
            tenant_id,
            operation,
            key,
        )
        return IdempotencyRow(*found[0]) if found else None

    async def body_at(self, seq: int) -> dict[str, Any]:
        """The body of one row. Raises JournalBroken when there is no such row or it is not a JSON object."""
        found = await self._all(f"SELECT {ROW} FROM journal WHERE {MAIN} AND seq = ?", seq)
        body = row_of(found[0]).body if found else {}
        if not body:
            raise JournalBroken(f"journal row {seq} of {self._target.name} is missing or damaged: run `spine verify`")
        return body

    async def outcome_of(self, decision_id: str, run_id: str | None) -> dict[str, Any] | None:
        """The body of the outcome of a decision of that run; without a run the whole journal is looked through."""
        where, values = ("run_id IS NULL", ()) if run_id is None else ("run_id = ?", (run_id,))
        found = await self._all(
            f"SELECT {ROW} FROM journal WHERE {MAIN} AND {where} AND ref = ? AND kind = 'outcome'",
            *values,
            decision_id,
        )
        return row_of(found[0]).body if found else None

    async def open_decisions(self, instances_dead_before_us: int) -> list[OpenDecision]:
        """Decisions without an outcome whose process is dead, oldest first.

        Dead is who gave its lease back, or runs no more; of other machines that is not known, and who held no lease at
        that time (unix microseconds) counts as dead.
        """
        dead = await self._without("open_decisions", "1 = 1", instances_dead_before_us, alive)
        found: list[OpenDecision] = []
        for instance in dead:
            rows = await self._scan(f"SELECT {columns(OpenDecision)} FROM open_decisions WHERE instance = ?", instance)
            found += [OpenDecision(*values) for values in rows]
        return sorted(found, key=lambda decision: decision.seq)

    async def _without(
        self, table: str, where: str, now_us: int, lease: Callable[[int | None, str | None, int], bool]
    ) -> list[str]:
        """The owners of rows of ``table`` without a ``lease``."""
        owners = await self._scan(
            f"SELECT d.instance, i.lease_until_at, i.process FROM (SELECT DISTINCT instance FROM {table} "
            f"WHERE {where}) d LEFT JOIN instances i ON i.instance = d.instance"
        )
        return [instance for instance, until, process in owners if not lease(until, process, now_us)]

    async def living(self, now_us: int) -> set[str]:
        """The instances that live at that time (unix microseconds; see ``open_decisions``)."""
        held = await self._all("SELECT instance, lease_until_at, process FROM instances")
        return {instance for instance, until, process in held if alive(until, process, now_us)}

    async def pending_events(self, limit: int = 100) -> list[dict[str, Any]]:
        """The bodies of up to ``limit`` events that wait to be published, in journal order."""
        found = await self._scan(
            f"SELECT {', '.join('j.' + name for name in ROW.split(', '))} FROM outbox o "
            f"JOIN journal j ON j.{MAIN} AND j.seq = o.seq WHERE o.state = 'pending' ORDER BY o.seq LIMIT ?",
            limit,
        )
        return [row_of(values).body for values in found]

    async def transaction(self, run_id: str, completion_key: str) -> TransactionRow | None:
        """The latest attempt to complete the run under the key, if there was one."""
        found = await self._all(
            f"SELECT {columns(TransactionRow)} FROM transactions WHERE run_id = ? AND completion_key = ? "
            "ORDER BY attempt DESC LIMIT 1",
            run_id,
            completion_key,
        )
        return TransactionRow(*found[0]) if found else None

    async def stranded(self, instances_dead_before_us: int, own: str) -> list[TransactionRow]:
        """The transactions in flight whose process holds no lease any more, or is ``own``, oldest first."""
        dead = await self._without("transactions", _IN_FLIGHT, instances_dead_before_us, holds)
        found: list[TransactionRow] = []
        for instance in {*dead, own}:
            rows = await self._scan(
                f"SELECT {columns(TransactionRow)} FROM transactions WHERE {_IN_FLIGHT} AND instance = ?", instance
            )
            found += [TransactionRow(*values) for values in rows]
        return sorted(found, key=lambda row: row.seq_begun)

    async def transaction_by_id(self, tx_id: str) -> TransactionRow | None:
        """The attempt with this id."""
        found = await self._all(f"SELECT {columns(TransactionRow)} FROM transactions WHERE tx_id = ?", tx_id)
        return TransactionRow(*found[0]) if found else None

    async def transaction_like(self, prefix: str) -> TransactionRow | None:
        """The first attempt, by id, whose id is ``prefix`` or begins with it."""
        found = await self._scan(
            f"SELECT {columns(TransactionRow)} FROM transactions WHERE tx_id >= ? AND tx_id < ? ORDER BY tx_id LIMIT 1",
            prefix,
            prefix + _LAST_CHARACTER,
        )
        return TransactionRow(*found[0]) if found else None

    async def parked_like(self, prefix: str, limit: int = 10) -> tuple[int, list[str]]:
        """How many parked transactions there are whose ids begin with ``prefix``, and up to ``limit`` ids, sorted."""
        found = await self._scan(
            "SELECT tx_id, count(*) OVER () FROM transactions WHERE state = 'PARKED' AND tx_id >= ? AND tx_id < ? "
            "ORDER BY tx_id LIMIT ?",
            prefix,
            prefix + _LAST_CHARACTER,
            limit,
        )
        return (found[0][1] if found else 0), [values[0] for values in found]

    async def parked(self, domain: str | None = None, limit: int = 1_000) -> list[ParkedRow]:
        """Up to ``limit`` steps whose rollback waits for an operator, oldest first; of one ``domain`` or of all."""
        found = await self._scan(
            "SELECT s.tx_id, t.run_id, t.tenant_id, s.domain, s.effect_id, s.error, t.epoch, s.seq FROM steps s "
            "JOIN transactions t ON t.tx_id = s.tx_id WHERE s.state = 'PARKED' AND t.state = 'PARKED' "
            f"AND ({'1 = 1' if domain is None else 's.domain = ?'}) ORDER BY s.seq LIMIT ?",
            *([] if domain is None else [domain]),
            limit,
        )
        return [ParkedRow(*values) for values in found]

    async def unended(self) -> dict[str, int]:
        """How many transactions are in which of the states that are not final."""
        return dict(await self._pairs(f"SELECT state, count(*) FROM transactions WHERE {_UNENDED} GROUP BY state"))

    async def bypassed_denials(self, epoch: int, limit: int = 100) -> tuple[int, list[dict[str, Any]]]:
        """How many decisions of a bypass would have been denials, and the bodies of the first ``limit``."""
        count, after = 0, await self._epoch_began(epoch)
        bodies: list[dict[str, Any]] = []
        while True:
            page = await self._scan(
                f"SELECT {ROW} FROM journal WHERE {MAIN} AND seq > ? AND kind IN ('decision', 'governance.changed') "
                "AND (kind <> 'decision' OR body LIKE ?) ORDER BY seq LIMIT ?",
                after,
                '%"effect":"bypassed"%',
                _PAGE,
            )
            for row in map(row_of, page):
                if row.body.get("kind") == "governance.changed":
                    return count, bodies
                if row.body.get("epoch") == epoch and row.body.get("would_have") is not None:
                    count += 1
                    if len(bodies) < limit:
                        bodies.append(row.body)
                after = row.seq
            if len(page) < _PAGE:
                return count, bodies

    async def _epoch_began(self, epoch: int) -> int:
        """The row that began the epoch; 0 for the first."""
        found = await self._scan(
            f"SELECT {ROW} FROM journal WHERE {MAIN} AND kind = 'governance.changed' ORDER BY seq DESC"
        )
        return next((row.seq for row in map(row_of, found) if row.body.get("epoch") == epoch), 0)

    async def tail(self, after_seq: int, limit: int = 100) -> list[Row]:
        """Up to ``limit`` rows behind ``after_seq``, in order."""
        found = await self._scan(
            f"SELECT {ROW} FROM journal WHERE {MAIN} AND seq > ? ORDER BY seq LIMIT ?", after_seq, limit
        )
        return [row_of(values) for values in found]

    async def counts(self) -> Counts:
        """How much there is of what."""
        states = dict(await self._pairs("SELECT state, count(*) FROM runs GROUP BY state"))
        contracts = dict(await self._pairs("SELECT overall, count(*) FROM contracts GROUP BY overall"))
        events = dict(await self._pairs("SELECT state, count(*) FROM outbox GROUP BY state"))
        unended = await self.unended()
        ((decisions, transactions),) = await self._scan(
            "SELECT (SELECT count(*) FROM open_decisions), (SELECT count(*) FROM transactions)"
        )
        return Counts(
            rows=(await self.head()).size,
            runs=sum(states.values()),
            runs_open=states.get("open", 0),
            runs_committed=states.get("committed", 0),
            runs_aborted=states.get("aborted", 0),
            runs_parked=states.get("parked", 0),
            decisions_open=decisions,
            transactions=transactions,
            transactions_in_flight=sum(unended.get(state, 0) for state in TxState.those_in_flight()),
            transactions_parked=unended.get(TxState.PARKED, 0),
            events=sum(events.values()),
            events_pending=events.get("pending", 0),
            contracts_pending=contracts.get("PENDING", 0),
            contracts_complete=contracts.get("COMPLETE", 0),
            contracts_incomplete=contracts.get("INCOMPLETE", 0),
            contracts_stale=contracts.get("STALE", 0),
        )

    async def _pairs(self, sql: str) -> list[tuple[str, int]]:
        return [(values[0], values[1]) for values in await self._scan(sql)]
