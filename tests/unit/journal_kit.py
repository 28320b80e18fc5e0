"""Records as the deciders write them, and a way around the journal for the tests that attack it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

from spine.governance.transactions import step_move
from spine.governance.units import CommitOutcome, Committed, Record, Unit, Write
from spine.journal.engine import parse_url
from spine.journal.reader import JournalReader
from spine.journal.writer import JournalWriter

FLAT = {
    "governance_active": True,
    "authority_degraded": False,
    "authority_reason": "allowed",
    "authority_code": "ALLOWED",
}
DIGEST = "0" * 64


def started(run: str = "run-1", *, implicit: bool = False, expectations: Sequence[dict[str, Any]] = ()) -> Record:
    fields = {"run_id": run, "tenant_id": "acme", "agent_id": "a7", "implicit": implicit, "instance": "i1", "epoch": 1}
    decision = {"allowed": True, "degraded": False, "code": "ALLOWED", "reason": "", "conditions": []}
    due_at = min((1_000 + round(promise["deadline_s"] * 1_000_000) for promise in expectations), default=None)
    fields |= {"expectations": list(expectations), "due_at": due_at, "decision": decision}
    return Record("run.started", 1_000, fields | FLAT)


def reconciled(run: str = "run-1", overall: str = "STALE", due_at: int | None = None, **changes: Any) -> Record:
    found: dict[str, list[Any]] = {name: [] for name in ("missing", "drift", "failed", "stale", "pending")}
    fields = {"run_id": run, "tenant_id": "acme", "overall": overall, "was": "PENDING", "due_at": due_at}
    return Record("contract.reconciled", 9_800, fields | found | {"previous": 1} | changes)


def decided(decision: str, run: str | None = "run-1", **changes: Any) -> Record:
    fields = {
        "decision_id": decision,
        "run_id": run,
        "tenant_id": "acme",
        "operation": "refunds.issue",
        "instance": "i1",
        "epoch": 1,
        "allowed": True,
        "degraded": False,
        "code": "ALLOWED",
        "reason": "",
        "conditions": [],
        "rules": [],
        "missing_inputs": [],
        "effect": "enforced",
        "would_have": None,
        "params": {"amount_cents": 4200},
        "params_digest": DIGEST,
        "masked": [],
        "key": None,
        "parent": None,
        "durability": "committed",
        "attempt": 1,
        "queue_us": 5,
        "eval_us": 7,
        "final": False,
    }
    return Record("decision", 2_000, fields | FLAT | changes)


def ended(decision: str, run: str | None = "run-1", **changes: Any) -> Record:
    fields = {
        "decision_id": decision,
        "run_id": run,
        "tenant_id": "acme",
        "operation": "refunds.issue",
        "instance": "i1",
        "success": True,
        "error": None,
        "error_code": None,
        "queue_us": 5,
        "handle_us": 9,
        "data": None,
        "key": None,
    }
    return Record("outcome", 3_000, fields | FLAT | changes)


def switched(to: str, epoch: int) -> Record:
    fields = {"from": "active", "to": to, "epoch": epoch, "reason": "drill", "actor": "ops", "expires_at": None}
    return Record("governance.changed", 4_000, fields)


def domain(n: int, name: str, cls: str = "LOCAL") -> dict[str, Any]:
    return {"n": n, "name": name, "class": cls, "action": "complete_run", "after": [], "effect_id": f"effect-{name}"}


def begun(tx: str, run: str = "run-1", **changes: Any) -> Record:
    fields = {
        "tx_id": tx,
        "run_id": run,
        "tenant_id": "acme",
        "agent_id": None,
        "completion_key": "",
        "digest": DIGEST,
        "attempt": 1,
        "previous": None,
        "run_status": "succeeded",
        "error_code": None,
        "error_message": None,
        "domains": [domain(0, "incidents")],
        "counts": [0, 0, 0],
        "epoch": 1,
        "governance_epoch": 1,
        "instance": "i1",
        "trace_id": None,
        "is_synthetic": False,
        "synthetic_scenario_id": None,
        "skip_events": False,
    }
    return Record("tx.begun", 5_000, fields | FLAT | changes)


def incident(row_id: str, run: str = "run-1") -> dict[str, Any]:
    row = {"id": row_id, "run_id": run, "tenant_id": "acme", "kind": "EXECUTION_SUCCESS", "status": "CLOSED"}
    return row | {"detail": '{"severity":"NONE"}', "created_at": 6_000, "is_synthetic": False}


def step(tx: str, n: int = 0, run: str = "run-1", rows: Sequence[dict[str, Any]] = (), **changes: Any) -> Record:
    fields = {
        "tx_id": tx,
        "run_id": run,
        "tenant_id": "acme",
        "n": n,
        "domain": "incidents",
        "class": "LOCAL",
        "state": "DONE",
        "effect_id": f"{tx}-{n}",
        "result_id": None,
        "error": None,
        "code": None,
        "rows": [{"table": "incidents", "row": row} for row in rows],
    }
    return Record("tx.step", 6_000, fields | changes)


def moved(tx: str, move: str, n: int = 0, run: str = "run-1", epoch: int = 1) -> Record:
    """A move of an EXTERNAL step."""
    fields = step(tx, n, run).fields | {"domain": "payments", "class": "EXTERNAL", "epoch": epoch, "move": move}
    return Record("tx.step", 6_500, fields | {"state": step_move(move).target.value})


def claimed(tx: str, epoch: int, run: str = "run-1") -> Record:
    fields = {"tx_id": tx, "run_id": run, "tenant_id": "acme", "epoch": epoch, "instance": "i2", "previous": "i1"}
    return Record("tx.claimed", 6_600, fields)


def acknowledged(tx: str, run: str = "run-1", status: str = "SUCCESS", **changes: Any) -> Record:
    fields = {"tx_id": tx, "run_id": run, "tenant_id": "acme", "domain": "incidents", "action": "create_incident"}
    return Record("ack", 7_000, fields | {"status": status, "result_id": None, "error": None} | changes)


def event(event_id: str, tx: str, n: int = 0, run: str = "run-1") -> Record:
    fields = {"event_id": event_id, "tx_id": tx, "run_id": run, "tenant_id": "acme", "n": n, "type": "run.completed"}
    return Record("event", 8_000, fields | {"payload": {"run_id": run}})


def committed(tx: str, run: str = "run-1", run_status: str = "succeeded") -> Record:
    fields = {"tx_id": tx, "run_id": run, "tenant_id": "acme", "run_status": run_status, "phase": "COMMITTED"}
    return Record("tx.committed", 9_000, fields | {"epoch": 1, "result": {"run_id": run}})


def aborting(tx: str, run: str = "run-1") -> Record:
    fields = {"tx_id": tx, "run_id": run, "tenant_id": "acme", "epoch": 1, "phase": "NOT_STARTED"}
    return Record("tx.aborting", 8_900, fields | {"failed_domain": "x", "code": "NO", "error": "no"})


def aborted(tx: str, run: str = "run-1") -> Record:
    fields = {"tx_id": tx, "run_id": run, "tenant_id": "acme", "state": "ABORTED", "phase": "NOT_STARTED", "epoch": 1}
    return Record("tx.aborted", 9_000, fields | {"failed_domain": "x", "code": "NO", "error": "no", "result": {}})


def published(*event_ids: str, run: str = "run-1") -> Record:
    fields = {"tx_id": "tx-1", "run_id": run, "tenant_id": "acme", "event_ids": list(event_ids), "attempts": 1}
    return Record("event.published", 9_500, fields)


def completion(tx: str, run: str = "run-1", writes: Sequence[Write] = ()) -> Unit:
    """A whole completion in one unit."""
    records = [
        begun(tx, run),
        step(tx, rows=[incident(f"incident-{tx}", run)], run=run),
        acknowledged(tx, run),
        event(f"event-{tx}", tx, run=run),
        committed(tx, run),
    ]
    return Unit(f"unit-{tx}", records, writes)


def day(runs: int = 3) -> list[Unit]:
    """A small varied day that touches every projection."""
    units = []
    for number in range(runs):
        run, promise = f"run-{number}", {"domain": "incidents", "action": "create_incident", "deadline_s": 30}
        units.append(Unit(f"start-{number}", [started(run, expectations=[promise])]))
        units.append(Unit(f"decide-{number}", [decided(f"d-{number}", run, key=f"k-{number}")], epoch=1))
        units.append(Unit(f"end-{number}", [ended(f"d-{number}", run, key=f"k-{number}")]))
        units.append(Unit(f"left-{number}", [decided(f"left-{number}", run)], epoch=1))
        units.append(completion(f"tx-{number}", run))
    units.append(Unit("published", [published("event-tx-0", run="run-0")]))
    row = incident("evaluation-1", "run-0")
    evaluation = {"run_id": "run-0", "tenant_id": "acme", "row": row}
    units.append(Unit("evaluation", [Record("policy.evaluation", 9_600, evaluation)]))
    units.append(Unit("lesson", [Record("lesson", 9_700, {"tenant_id": "acme", "row": row | {"id": "lesson-1"}})]))
    units.append(Unit("switch", [switched("degraded", 2)], epoch=1))
    return units


@asynccontextmanager
async def writing(url: str, **settings: Any) -> AsyncIterator[JournalWriter]:
    writer = JournalWriter(url, **settings)
    await writer.open()
    try:
        yield writer
    finally:
        await writer.close()


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[JournalReader]:
    reader = JournalReader(url)
    try:
        yield reader
    finally:
        await reader.close()


async def write(url: str, units: Sequence[Unit]) -> list[CommitOutcome]:
    async with writing(url) as writer:
        return await writer.commit(units)


def all_committed(outcomes: Sequence[CommitOutcome]) -> bool:
    return all(isinstance(outcome, Committed) for outcome in outcomes)


def sql(url: str, statement: str, *params: Any) -> list[tuple[Any, ...]]:
    """Run a statement (with ``?``) past the journal, in a transaction of its own."""
    target = parse_url(url)
    if target.path is not None:
        with closing(sqlite3.connect(target.path, isolation_level=None)) as file:
            return file.execute(statement, params).fetchall()
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as server:
        cursor = server.execute(statement.replace("?", "%s"), params or None)
        return cursor.fetchall() if cursor.description else []
