"""What each record changes in the tables beside the journal, as data: the same for the writer and for ``verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from spine.governance.contract import PENDING, moment_of
from spine.governance.units import VERDICT_GUARD
from spine.journal.domain_rows import domain_row
from spine.journal.statements import Fields, Operation, delete, insert, update
from spine.journal.tx_projections import TX_MAKERS

GUARD_RUN: Final = "run claim"
GUARD_IDEMPOTENCY: Final = "idempotency claim"
GUARD_GOVERNANCE: Final = "governance epoch"
GUARD_DECISION: Final = "decision claim"
GUARD_DECISION_OPEN: Final = "decision open"
GUARD_KEY_OPEN: Final = "idempotency open"
GUARD_EXPECTATION: Final = "expectation claim"
GUARD_CONTRACT: Final = "contract claim"
GUARD_ACKNOWLEDGEMENT: Final = "acknowledgement"
GUARD_EVENT: Final = "event claim"
GUARD_EVENT_KNOWN: Final = "event known"

INSERT_RUN: Final = insert("runs", 1, GUARD_RUN, "run_id tenant_id agent_id implicit state started_seq started_at")
INSERT_EXPECTATION: Final = insert(
    "run_expectations", 2, GUARD_EXPECTATION, "run_id domain action deadline_at", key=(0, 1, 2)
)
INSERT_ACKNOWLEDGEMENT: Final = insert(
    "acknowledgements", 5, GUARD_ACKNOWLEDGEMENT, "seq run_id tx_id domain action status result_id error"
)
INSERT_DECISION: Final = insert(
    "open_decisions", 6, GUARD_DECISION, "decision_id instance seq run_id tenant_id operation key"
)
INSERT_KEY: Final = insert(
    "idempotency",
    7,
    GUARD_IDEMPOTENCY,
    "tenant_id operation key digest decision_id state seq_decision",
    key=(0, 1, 2),
)
INSERT_EVENT: Final = insert("outbox", 8, GUARD_EVENT, "event_id tx_id run_id n type state seq")
INSERT_CONTRACT: Final = insert("contracts", 18, GUARD_CONTRACT, "run_id overall due_at seq")
UPDATE_GOVERNANCE: Final = update(
    "governance",
    20,
    GUARD_GOVERNANCE,
    "state = ?, epoch = ?, reason = ?, actor = ?, since_at = ?, expires_at = ?, seq = ?",
    "id = ? AND epoch = ?",
    key=(7,),
)
RECLAIM_KEY: Final = update(
    "idempotency",
    21,
    GUARD_IDEMPOTENCY,
    "decision_id = ?, state = ?, seq_decision = ?, seq_outcome = NULL",
    "tenant_id = ? AND operation = ? AND key = ? AND digest = ? AND state = 'interrupted'",
    key=(3, 4, 5),
)
CLOSE_KEY: Final = update(
    "idempotency",
    22,
    GUARD_KEY_OPEN,
    "state = ?, seq_outcome = ?",
    "tenant_id = ? AND operation = ? AND key = ? AND decision_id = ? AND state = 'open'",
    key=(2, 3, 4),
)
PUBLISH_EVENT: Final = update("outbox", 51, GUARD_EVENT_KNOWN, "state = 'published'", "event_id = ?", key=(0,))
UPDATE_CONTRACT: Final = update(
    "contracts", 52, VERDICT_GUARD, "overall = ?, due_at = ?, seq = ?", "run_id = ? AND seq = ?", key=(3,)
)
NOTICE_REPORT: Final = update("contracts", 53, VERDICT_GUARD, "seq = ?", "run_id = ? AND seq = ?", key=(1,))
CLOSE_DECISION: Final = delete("open_decisions", 60, GUARD_DECISION_OPEN, "decision_id", undoes=INSERT_DECISION)


def _run_started(fields: Fields, seq: int) -> list[Operation]:
    run_id, at = fields["run_id"], fields["at"]
    found: list[Operation] = [
        (
            INSERT_RUN,
            (run_id, fields["tenant_id"], fields.get("agent_id"), bool(fields.get("implicit")), "open", seq, at),
        )
    ]
    for promise in fields.get("expectations") or ():
        deadline_at = moment_of(at, promise["deadline_s"])
        found.append((INSERT_EXPECTATION, (run_id, promise["domain"], promise["action"], deadline_at)))
    due_at = fields.get("due_at")
    if due_at is not None:
        # None where nothing was promised, or where the unit that starts the run judges its contract too.
        found.append((INSERT_CONTRACT, (run_id, PENDING, due_at, seq)))
    return found


def _contract_reconciled(fields: Fields, seq: int) -> list[Operation]:
    run_id, overall, due_at, previous = fields["run_id"], fields["overall"], fields["due_at"], fields["previous"]
    if previous is None:
        return [(INSERT_CONTRACT, (run_id, overall, due_at, seq))]
    return [(UPDATE_CONTRACT, (overall, due_at, seq, run_id, previous))]


def _decision(fields: Fields, seq: int) -> list[Operation]:
    decision_id, key, final = fields["decision_id"], fields.get("key"), fields["final"]
    tenant_id, operation = fields["tenant_id"], fields["operation"]
    found: list[Operation] = []
    if not final:
        place = (decision_id, fields["instance"], seq, fields.get("run_id"), tenant_id, operation, key)
        found.append((INSERT_DECISION, place))
    if key is not None:
        state, digest = "denied" if final else "open", fields["params_digest"]
        if fields.get("attempt", 1) > 1:
            found.append((RECLAIM_KEY, (decision_id, state, seq, tenant_id, operation, key, digest)))
        else:
            found.append((INSERT_KEY, (tenant_id, operation, key, digest, decision_id, state, seq)))
    return found


def _outcome(fields: Fields, seq: int) -> list[Operation]:
    decision_id, key = fields["decision_id"], fields.get("key")
    found: list[Operation] = [(CLOSE_DECISION, (decision_id,))]
    if key is not None:
        state = "interrupted" if fields.get("error_code") == "INTERRUPTED" else "done"
        found.append((CLOSE_KEY, (state, seq, fields["tenant_id"], fields["operation"], key, decision_id)))
    return found


def _governance_changed(fields: Fields, seq: int) -> list[Operation]:
    epoch = fields["epoch"]
    return [
        (
            UPDATE_GOVERNANCE,
            (
                fields["to"],
                epoch,
                fields.get("reason"),
                fields.get("actor"),
                fields["at"],
                fields.get("expires_at"),
                seq,
                1,
                epoch - 1,
            ),
        )
    ]


def _ack(fields: Fields, seq: int) -> list[Operation]:
    found: list[Operation] = [
        (
            INSERT_ACKNOWLEDGEMENT,
            (
                seq,
                fields["run_id"],
                fields.get("tx_id"),
                fields["domain"],
                fields["action"],
                fields["status"],
                fields.get("result_id"),
                fields.get("error"),
            ),
        )
    ]
    if (judged := fields.get("contract")) is not None:
        found.append((NOTICE_REPORT, (seq, fields["run_id"], judged)))
    return found


def _event(fields: Fields, seq: int) -> list[Operation]:
    place = (fields["event_id"], fields.get("tx_id"), fields.get("run_id"), fields["n"], fields["type"], "pending", seq)
    return [(INSERT_EVENT, place)]


def _event_published(fields: Fields, seq: int) -> list[Operation]:  # noqa: ARG001  the table of makers has one shape
    return [(PUBLISH_EVENT, (event_id,)) for event_id in fields["event_ids"]]


def _policy_evaluation(fields: Fields, seq: int) -> list[Operation]:
    return [domain_row("policy_evaluations", fields["row"], fields, seq)]


def _lesson(fields: Fields, seq: int) -> list[Operation]:
    return [domain_row("lessons", fields["row"], fields, seq)]


MAKERS: Final[Mapping[str, Callable[[Fields, int], list[Operation]]]] = {
    "run.started": _run_started,
    "decision": _decision,
    "outcome": _outcome,
    "governance.changed": _governance_changed,
    **TX_MAKERS,
    "ack": _ack,
    "contract.reconciled": _contract_reconciled,
    "event": _event,
    "event.published": _event_published,
    "policy.evaluation": _policy_evaluation,
    "lesson": _lesson,
}


def projections(fields: Fields, seq: int) -> list[Operation]:
    """The changes that the record with this whole body makes as journal row ``seq``; none for a kind without tables.

    Raises LookupError, TypeError or ValueError when a field is missing or of another type.
    """
    maker = MAKERS.get(fields["kind"])
    return [] if maker is None else maker(fields, seq)
