"""What must hold once nothing is in flight, however the lives before ended; read without Spine's own reader."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spine.journal.verify import verify
from tests.crash.life import Told
from tests.crash.outside import Services, kind_of
from tests.governed import SQLITE, connect

ENDS = {
    "tx.committed": "COMMITTED",
    "tx.aborting": "COMPENSATING",
    "tx.aborted": "ABORTED",
    "tx.parked": "PARKED",
    "tx.retried": "COMPENSATING",
    "tx.resolved": "ABORTED_MANUAL",
}
LEGAL = {
    "EXECUTING": {"COMMITTED", "COMPENSATING"},
    "COMPENSATING": {"ABORTED", "PARKED"},
    "PARKED": {"COMPENSATING", "ABORTED_MANUAL"},
}
TELLS = {
    "committed": "tx.committed",
    "again": "tx.committed",
    "rolled back": "tx.aborted",
    "parked": "tx.parked",
    "retried": "tx.retried",
    "resolved": "tx.resolved",
}
COMMITS = {"commit", "twice", "ledger"}
PARKS = {"park", "retry", "resolve"}
BEFORE_COMMIT = ("incidents", "policies", "traces", "stock", "payment", "ledger")
BUILT_IN = ("incidents", "policy_evaluations", "traces")


class Record:
    """What is left of some lives: the journal, the services, and what callers were told."""

    def __init__(self, url: str, place: Path) -> None:
        self._postgresql = not url.startswith(SQLITE)
        self._database = connect(url)
        self.journal = [json.loads(body) | {"seq": seq} for seq, body in self.query("SELECT seq, body FROM journal")]
        self.journal.sort(key=lambda row: row["seq"])
        self.services = Services(place / "services")
        self.told = Told(place / "told")
        self.rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in self.journal:
            if row.get("tx_id") is not None:
                self.rows[row["tx_id"]].append(row)
        self.begun = {row["tx_id"]: row for row in self.journal if row["kind"] == "tx.begun"}
        self.states = dict(self.query("SELECT tx_id, state FROM transactions"))

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._database.execute(sql.replace("?", "%s") if self._postgresql else sql, values).fetchall()

    def close(self) -> None:
        self._database.close()
        self.services.close()
        self.told.close()

    def of(self, tx: str, *kinds: str) -> list[Mapping[str, Any]]:
        return [row for row in self.rows[tx] if row["kind"] in kinds]


def check(url: str, place: Path) -> None:
    """Every invariant; the first that does not hold is an AssertionError that names the transaction."""
    report = verify(url)
    assert report.ok, f"the chain or a projection is broken: {report.breaks}"
    record = Record(url, place)
    try:
        assert set(record.rows) == set(record.begun) == set(record.states), "records of an unknown transaction"
        for tx in record.begun:
            _moved_as_the_table_allows(record, tx)
        _told_outcomes_stand(record)
        _nothing_is_half(record)
        # What the network still holds arrives now, and changes nothing.
        record.services.late_duplicates()
        _nothing_is_half(record)
        _events_only_of_committed_and_in_order(record)
    finally:
        record.close()


def _moved_as_the_table_allows(record: Record, tx: str) -> None:
    """Every move is one of the table's, none is under a stale epoch, nothing is in flight any more."""
    state, epoch = "EXECUTING", 1
    for row in record.rows[tx]:
        if "epoch" in row and row["kind"] != "event.published":
            raised = row["kind"] in ("tx.claimed", "tx.retried")
            assert row["epoch"] == epoch + raised, f"{tx}: {row['kind']} under epoch {row['epoch']}, not {epoch}"
            epoch = row["epoch"]
        if (target := ENDS.get(row["kind"])) is not None:
            assert target in LEGAL.get(state, ()), f"{tx}: {row['kind']} while {state}"
            state = target
    assert state == record.states[tx], f"{tx}: the journal says {state}, its row {record.states[tx]}"
    assert state in ("COMMITTED", "ABORTED", "PARKED", "ABORTED_MANUAL"), f"{tx} is still {state}"


def _told_outcomes_stand(record: Record) -> None:
    for line in record.told.of(*TELLS):
        assert record.of(line["tx"], TELLS[line["what"]]), f"told, but not recorded: {line}"
        state = record.states[line["tx"]]
        if line["what"] in ("committed", "again"):
            assert state == "COMMITTED", f"told {line}, is {state}"
            published = {e for row in record.of(line["tx"], "event.published") for e in row["event_ids"]}
            events = [row for row in record.of(line["tx"], "event") if row["type"] in line["events"]]
            assert len(events) == len(line["events"]), f"told of events that are not recorded: {line}"
            assert all(row["event_id"] in published for row in events), f"told of unpublished events: {line}"
        elif line["what"] == "rolled back":
            assert state == "ABORTED", f"told {line}, is {state}"
    asked = {(line["run"], line["key"]): line["tx"] for line in record.told.of("committed")}
    for line in record.told.of("again"):
        assert line["tx"] == asked[line["run"], line["key"]], f"asked again, another transaction: {line}"


def _nothing_is_half(record: Record) -> None:
    for tx, begun in record.begun.items():
        match record.states[tx]:
            case "COMMITTED":
                _whole(record, tx, begun)
            case "PARKED":
                _parked(record, tx, begun)
            case _:
                _undone(record, tx, begun)


def _effects(begun: Mapping[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["effect_id"] for entry in begun["domains"]}


def _acks(record: Record, tx: str, *statuses: str) -> set[str]:
    return {row["domain"] for row in record.of(tx, "ack") if row["status"] in statuses}


def _written(record: Record, begun: Mapping[str, Any]) -> set[str]:
    """The LOCAL domains whose rows are in the database."""
    effects = _effects(begun)
    found = {"ledger": record.query("SELECT 1 FROM ledger WHERE effect_id = ?", effects["ledger"])}
    for name, table in zip(("incidents", "policies", "traces"), BUILT_IN, strict=True):
        found[name] = record.query(f"SELECT 1 FROM {table} WHERE id = ?", effects[name])
    return {name for name, rows in found.items() if rows}


def _whole(record: Record, tx: str, begun: Mapping[str, Any]) -> None:
    run, effects = begun["run_id"], _effects(begun)
    assert kind_of(run) in COMMITS, f"{tx}: {run} committed"
    for name in ("stock", "payment"):
        assert effects[name] in record.services.live, f"{tx}: committed, but {name} does not have its effect"
    assert _written(record, begun) == {"incidents", "policies", "traces", "ledger"}, f"{tx}: rows are missing"
    wanted = {*BEFORE_COMMIT, "mail", "orchestrator"}
    assert _acks(record, tx, "SUCCESS") == wanted, f"{tx}: acknowledged by {_acks(record, tx, 'SUCCESS')}"
    assert not _acks(record, tx, "FAILED", "ROLLED_BACK"), f"{tx}: committed, with acknowledgements of failure"
    assert not record.of(tx, "tx.aborting"), f"{tx}: committed after a decision to abort"
    sent_back = [line for line in record.services.of("rollback") if line["tx"] == tx]
    assert not sent_back, f"{tx}: committed, and a rollback was sent"


def _undone(record: Record, tx: str, begun: Mapping[str, Any]) -> None:
    effects = _effects(begun)
    standing = [name for name in ("stock", "payment") if effects[name] in record.services.live]
    assert not standing, f"{tx}: {record.states[tx]}, but {standing} have their effects"
    assert not _written(record, begun), f"{tx}: {record.states[tx]}, but rows are written"
    assert not record.of(tx, "event"), f"{tx}: {record.states[tx]}, with events"
    intended = {row["domain"] for row in record.of(tx, "tx.step") if row.get("move") == "intend"}
    sent = {line["domain"] for line in record.services.of("sent") if line["tx"] == tx}
    assert sent <= intended, f"{tx}: sent to {sent}, intended were {intended}"
    assert intended <= _acks(record, tx, "ROLLED_BACK"), f"{tx}: undone without acknowledgements"
    failed = {row["failed_domain"] for row in record.of(tx, "tx.aborting")}
    assert failed <= _acks(record, tx, "FAILED"), f"{tx}: {failed} failed without acknowledgement"
    assert "orchestrator" in _acks(record, tx, "FAILED"), f"{tx}: the end is not acknowledged"
    states = dict(record.query("SELECT domain, state FROM steps WHERE tx_id = ?", tx))
    if record.states[tx] == "ABORTED":
        assert set(states.values()) <= {"PLANNED", "ROLLED_BACK"}, f"{tx}: aborted, with steps {states}"
        assert all(states[name] == "ROLLED_BACK" for name in failed & intended | failed & {"ledger"}), f"{tx}: {states}"
        assert failed & {"ledger"} <= _acks(record, tx, "ROLLED_BACK"), f"{tx}: ledger without acknowledgement"
    _undone_in_reverse(record, tx)


def _undone_in_reverse(record: Record, tx: str) -> None:
    """The payment, which came after the stock, is undone before it."""
    moves = [(row["domain"], row["move"]) for row in record.of(tx, "tx.step") if "move" in row]
    undone = [name for name, move in moves if move == "undone"]
    assert undone == sorted(undone, key=("payment", "stock").index), f"{tx}: undone in the order {undone}"


def _parked(record: Record, tx: str, begun: Mapping[str, Any]) -> None:
    run = begun["run_id"]
    waiting = record.query("SELECT error FROM steps WHERE tx_id = ? AND state = 'PARKED'", tx)
    assert waiting, f"{tx}: parked, and no domain says why"
    # On a busy machine a rollback may take too long for its deadline, time after time; and one in whose middle
    # process after process is killed is an operator's.
    late = any("gave no answer" in error or "processes in a row ended" in error for (error,) in waiting)
    assert late or kind_of(run) in PARKS, f"{tx}: {run} is parked"
    (state,) = record.query("SELECT state FROM runs WHERE run_id = ?", run)[0]
    assert state == "parked", f"{tx}: parked, and its run is {state}"
    assert not _written(record, begun), f"{tx}: parked, but rows are written"
    assert not record.of(tx, "event"), f"{tx}: parked, with events"


def _events_only_of_committed_and_in_order(record: Record) -> None:
    events = {row["event_id"]: row for row in record.journal if row["kind"] == "event"}
    pending = record.query("SELECT event_id FROM outbox WHERE state = 'pending'")
    assert not pending, f"events wait: {pending}"
    delivered = [line["event"] for line in record.services.of("delivered")]
    assert set(delivered) == set(events), "not every event was delivered, or others were"
    published = {event for row in record.journal if row["kind"] == "event.published" for event in row["event_ids"]}
    assert published == set(events), "an event is not recorded as published"
    runs: dict[str, list[int]] = defaultdict(list)
    for event in _once(delivered):
        runs[events[event]["run_id"]].append(events[event]["seq"])
    for run, seqs in runs.items():
        assert seqs == sorted(seqs), f"{run}: events delivered in the order {seqs}"


def _once(delivered: Iterable[str]) -> list[str]:
    """Each event where it was delivered for the first time."""
    return list(dict.fromkeys(delivered))
