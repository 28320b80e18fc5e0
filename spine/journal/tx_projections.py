"""What the records of transactions and steps change: compare-and-sets made from the transition table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from spine.governance.transactions import (
    STEP_MOVES,
    TX_MOVES,
    TX_RECORDS,
    DomainClass,
    StepState,
    TxMove,
    TxState,
    step_move,
    tx_move,
)
from spine.journal.domain_rows import domain_row
from spine.journal.statements import Fields, Operation, insert, update, words

GUARD_TRANSACTION: Final = "transaction claim"
GUARD_TRANSACTION_STATE: Final = "transaction state"
GUARD_RUN_KNOWN: Final = "run known"
GUARD_STEP: Final = "step"

INSERT_TRANSACTION: Final = insert(
    "transactions",
    3,
    GUARD_TRANSACTION,
    "tx_id run_id tenant_id completion_key digest attempt previous state epoch instance seq_begun",
)
INSERT_STEP: Final = insert(
    "steps", 4, GUARD_STEP, "tx_id n domain class state effect_id result_id error seq", key=(0, 1)
)
CLAIM_TRANSACTION: Final = update(
    "transactions",
    23,
    GUARD_TRANSACTION_STATE,
    "epoch = ?, instance = ?",
    f"tx_id = ? AND epoch = ? AND state IN ({words(TxState.those_in_flight())})",
    key=(2,),
)
MOVE_STEP: Final = {
    move.name: update(
        "steps",
        24 + place,
        GUARD_STEP,
        "state = ?, result_id = ?, error = ?, seq = ?",
        f"tx_id = ? AND n = ? AND state IN ({words(move.sources)}) AND EXISTS (SELECT 1 FROM transactions t "
        f"WHERE t.tx_id = steps.tx_id AND t.epoch = ? AND t.state = '{move.within}')",
        key=(4, 5),
    )
    for place, move in enumerate(STEP_MOVES)
}
_STEPS: Final = "EXISTS (SELECT 1 FROM steps s WHERE s.tx_id = transactions.tx_id AND s.state"


def _steps_as_demanded(move: TxMove) -> str:
    every = f" AND NOT {_STEPS} NOT IN ({words(move.every)}))" if move.every else ""
    some = f" AND {_STEPS} IN ({words(move.some)}))" if move.some else ""
    return every + some


MOVE_TRANSACTION: Final = {
    move.name: update(
        "transactions",
        40 + place,
        GUARD_TRANSACTION_STATE,
        "state = ?, epoch = ?, instance = COALESCE(?, instance), phase = COALESCE(?, phase), seq_ended = ?",
        f"tx_id = ? AND epoch = ? AND state = '{move.source}'{_steps_as_demanded(move)}",
        key=(5,),
    )
    for place, move in enumerate(TX_MOVES)
}
END_RUN: Final = update(
    "runs",
    50,
    GUARD_RUN_KNOWN,
    "state = ?, run_status = COALESCE(?, run_status), completed_seq = ?, completed_at = ?, tx_id = ?",
    "run_id = ?",
    key=(5,),
)


def _tx_begun(fields: Fields, seq: int) -> list[Operation]:
    tx_id = fields["tx_id"]
    found: list[Operation] = [
        (
            INSERT_TRANSACTION,
            (
                tx_id,
                fields["run_id"],
                fields["tenant_id"],
                fields["completion_key"],
                fields["digest"],
                fields["attempt"],
                fields.get("previous"),
                TxState.EXECUTING.value,
                fields["epoch"],
                fields["instance"],
                seq,
            ),
        )
    ]
    # A LOCAL step has its row from the end on, which is its own commit; one outside from before it is asked.
    found += [
        (
            INSERT_STEP,
            (
                tx_id,
                step["n"],
                step["name"],
                step["class"],
                StepState.PLANNED.value,
                step["effect_id"],
                None,
                None,
                seq,
            ),
        )
        for step in fields["domains"]
        if step["class"] == DomainClass.EXTERNAL
    ]
    return found


def _tx_step(fields: Fields, seq: int) -> list[Operation]:
    tx_id, n, state = fields["tx_id"], fields["n"], fields["state"]
    result_id, error = fields.get("result_id"), fields.get("error")
    if fields["class"] == DomainClass.EXTERNAL:
        move = step_move(fields["move"])
        if state != move.target:
            raise ValueError(f"move {move.name} of a step leads to {move.target}, not to {state!r}")
        return [(MOVE_STEP[move.name], (state, result_id, error, seq, tx_id, n, fields["epoch"]))]
    place = (tx_id, n, fields["domain"], fields["class"], state, fields.get("effect_id"), result_id, error, seq)
    found: list[Operation] = [(INSERT_STEP, place)]
    found.extend(domain_row(entry["table"], entry["row"], fields, seq) for entry in fields.get("rows") or ())
    return found


def _tx_claimed(fields: Fields, seq: int) -> list[Operation]:  # noqa: ARG001  the table of makers has one shape
    epoch = fields["epoch"]
    return [(CLAIM_TRANSACTION, (epoch, fields["instance"], fields["tx_id"], epoch - 1))]


RUN_STATES: Final = {
    TxState.COMMITTED: "committed",
    TxState.ABORTED: "aborted",
    TxState.ABORTED_MANUAL: "aborted",
    TxState.PARKED: "parked",
}


def _tx_moved(name: str) -> Callable[[Fields, int], list[Operation]]:
    """The maker for the record of one move of a transaction; what ends it ends its run's completion."""
    move, statement = tx_move(name), MOVE_TRANSACTION[name]
    run_state = RUN_STATES.get(move.target)
    # To go on with what was parked takes a new fencing token: whoever drove it before changes nothing any more.
    raised = 1 if move.source is TxState.PARKED and run_state is None else 0

    def make(fields: Fields, seq: int) -> list[Operation]:
        tx_id, epoch = fields["tx_id"], fields["epoch"]
        ended = seq if run_state is not None else None
        instance = fields.get("instance") if raised else None
        place = (move.target.value, epoch, instance, fields.get("phase"), ended, tx_id, epoch - raised)
        found: list[Operation] = [(statement, place)]
        if run_state is not None:
            done = (run_state, fields.get("run_status"), seq, fields["at"], tx_id, fields["run_id"])
            found.append((END_RUN, done))
        return found

    return make


TX_MAKERS: Final = {
    "tx.begun": _tx_begun,
    "tx.step": _tx_step,
    "tx.claimed": _tx_claimed,
    **{kind: _tx_moved(name) for kind, name in TX_RECORDS.items()},
}
