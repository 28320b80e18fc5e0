"""What the journal's reader returns: rows as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One journal row; ``raw`` is the body as stored, ``body`` what it says (empty when it is not a JSON object)."""

    seq: int
    prev: bytes
    hash: bytes
    body: dict[str, Any]
    raw: str


@dataclass(frozen=True, slots=True)
class HeadRow:
    """Where the chain ends: the number of its rows and the last one's hash."""

    size: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class GovernanceRow:
    """The governance state and when, by whom, why and until when it was set (unix microseconds)."""

    state: str
    epoch: int
    reason: str | None
    actor: str | None
    since_at: int
    expires_at: int | None
    seq: int


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run; ``state`` is open, committed, aborted or parked; times in unix microseconds."""

    run_id: str
    tenant_id: str
    agent_id: str | None
    implicit: bool
    state: str
    run_status: str | None
    started_seq: int
    started_at: int
    completed_seq: int | None
    completed_at: int | None
    tx_id: str | None


@dataclass(frozen=True, slots=True)
class DueContract:
    """A run whose contract is to be judged at ``due_at`` (unix microseconds)."""

    run_id: str
    due_at: int


@dataclass(frozen=True, slots=True)
class IdempotencyRow:
    """A claimed key; ``state`` is open, done, interrupted or denied."""

    tenant_id: str
    operation: str
    key: str
    digest: str
    decision_id: str
    state: str
    seq_decision: int
    seq_outcome: int | None


@dataclass(frozen=True, slots=True)
class OpenDecision:
    """An allowed operation of which no end is recorded."""

    decision_id: str
    instance: str
    seq: int
    run_id: str | None
    tenant_id: str
    operation: str
    key: str | None


@dataclass(frozen=True, slots=True)
class TransactionRow:
    """One attempt to complete a run."""

    tx_id: str
    run_id: str
    tenant_id: str
    completion_key: str
    digest: str
    attempt: int
    previous: str | None
    state: str
    phase: str | None
    epoch: int
    instance: str
    seq_begun: int
    seq_ended: int | None


@dataclass(frozen=True, slots=True)
class ParkedRow:
    """One step whose rollback waits for an operator; ``at`` in unix microseconds."""

    tx_id: str
    run_id: str
    tenant_id: str
    domain: str
    effect_id: str
    error: str | None
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How much the journal holds, for health and totals."""

    rows: int
    runs: int
    runs_open: int
    runs_committed: int
    runs_aborted: int
    runs_parked: int
    decisions_open: int
    transactions: int
    transactions_in_flight: int
    transactions_parked: int
    events: int
    events_pending: int
    contracts_pending: int
    contracts_complete: int
    contracts_incomplete: int
    contracts_stale: int
