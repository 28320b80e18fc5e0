"""Journal rows as the journal would return them, built without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FLAT = {"governance_active": True, "authority_degraded": False, "authority_reason": "ok", "authority_code": "ALLOWED"}

# The record of the move into each state.
MOVED = {
    "ABORTED": "tx.aborted",
    "COMPENSATING": "tx.aborting",
    "PARKED": "tx.parked",
    "ABORTED_MANUAL": "tx.resolved",
}


@dataclass
class Row:
    seq: int
    body: dict[str, Any]


@dataclass
class Journal:
    """Appends rows the way the actors record them."""

    run_id: str = "run-1"
    tenant_id: str = "acme"
    rows: list[Row] = field(default_factory=list)
    at: int = 1_000_000

    def add(self, kind: str, **fields: Any) -> Row:
        self.at += 1_000
        body = {"kind": kind, "at": self.at, "run_id": self.run_id, "tenant_id": self.tenant_id, **FLAT, **fields}
        self.rows.append(Row(len(self.rows) + 1, body))
        return self.rows[-1]

    def start(self, **fields: Any) -> Row:
        decision = {"allowed": True, "degraded": False, "code": "ALLOWED", "reason": "ok", "conditions": []}
        return self.add(
            "run.started", **{"agent_id": "a7", "implicit": False, "expectations": [], "decision": decision, **fields}
        )

    def refuse_start(self, code: str = "DEGRADED_NEW_RUN", reason: str = "the authority is degraded") -> Row:
        return self.add(
            "run.denied", operation="run.start", decision_id="d0", allowed=False, degraded=False, code=code,
            reason=reason, conditions=[], rules=[], missing_inputs=[],
        )  # fmt: skip

    def decide(self, decision_id: str, operation: str = "refunds.issue", *, allowed: bool = True, **fields: Any) -> Row:
        defaults: dict[str, Any] = {
            "decision_id": decision_id, "operation": operation, "allowed": allowed, "degraded": False,
            "code": "ALLOWED" if allowed else "DENIED", "reason": "ok", "conditions": [], "rules": [],
            "missing_inputs": [], "effect": "enforced",
            "would_have": None, "final": not allowed, "key": None, "parent": None,
        }  # fmt: skip
        return self.add("decision", **{**defaults, **fields})

    def end(self, decision_id: str, *, success: bool = True, **fields: Any) -> Row:
        defaults: dict[str, Any] = {"error": None, "error_code": None, "queue_us": 1500, "handle_us": 2500}
        return self.add("outcome", decision_id=decision_id, success=success, **{**defaults, **fields})

    def begin(self, tx_id: str = "t1", run_status: str = "succeeded", **fields: Any) -> Row:
        defaults: dict[str, Any] = {
            "completion_key": "", "attempt": 1, "error_code": None, "error_message": None,
            "domains": [{"n": 0, "name": "incidents", "class": "LOCAL"}, {"n": 1, "name": "ledger", "class": "LOCAL"}],
        }  # fmt: skip
        return self.add("tx.begun", tx_id=tx_id, run_status=run_status, **{**defaults, **fields})

    def step(self, n: int, domain: str, state: str, tx_id: str = "t1", **fields: Any) -> Row:
        return self.add(
            "tx.step", **{"tx_id": tx_id, "n": n, "domain": domain, "class": "LOCAL", "state": state, "result_id": None,
                          "error": None, "code": None, **fields},
        )  # fmt: skip

    def commit(self, tx_id: str = "t1", run_status: str = "succeeded") -> Row:
        return self.add("tx.committed", tx_id=tx_id, run_status=run_status, phase="COMMITTED", result={})

    def abort(self, tx_id: str = "t1", **fields: Any) -> Row:
        defaults = {
            "state": "ABORTED",
            "phase": "ROLLED_BACK",
            "failed_domain": "ledger",
            "code": "NO_FUNDS",
            "error": "empty",
        }
        fields = {**defaults, **fields}
        return self.add(MOVED[str(fields["state"])], tx_id=tx_id, **fields)

    def complete(self, run_status: str = "succeeded", tx_id: str = "t1", **fields: Any) -> Row:
        self.begin(tx_id, run_status, **fields)
        self.step(0, "incidents", "DONE", tx_id, result_id="i1")
        self.step(1, "ledger", "DONE", tx_id)
        return self.commit(tx_id, run_status)
