"""What the journal lets a transaction and its steps do is what the transition table allows, and nothing else.

A coordinator that believes something else of a transaction, for whatever reason, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest

from spine.governance.transactions import (
    STEP_MOVES,
    TX_MOVES,
    TX_RECORDS,
    IllegalTransition,
    StepMove,
    StepState,
    TxMove,
    TxState,
    move_step,
    move_tx,
)
from spine.governance.units import Committed, GuardFailed, Record, Unit
from tests.unit.journal_kit import all_committed, begun, claimed, domain, moved, sql, started, writing

pytestmark = pytest.mark.anyio

# How the one transaction of a case stands, and what is recorded of it.
Case = tuple[TxState, Sequence[StepState], Record]
KINDS = {move: kind for kind, move in TX_RECORDS.items()}
# Of a second step there is one to every state of the first.
STEPS = [*((state,) for state in StepState), *product([StepState.DONE, StepState.PARKED], StepState)]


def moves(tx: str, move: TxMove, epoch: int = 1) -> Record:
    """A move of the transaction, by whom the fencing token ``epoch`` was given."""
    raised = move.name == "retry"
    fields = {"tx_id": tx, "run_id": tx, "tenant_id": "acme", "epoch": epoch + raised, "phase": "FAILED"}
    return Record(KINDS[move.name], 9_000, fields | {"state": move.target.value, "instance": "i1"})


async def recorded(url: str, cases: Sequence[Case]) -> list[bool]:
    """Which of the cases' records the journal takes; those it refuses must be refused by a guard."""
    names = [record.fields["tx_id"] for _, _, record in cases]
    async with writing(url) as writer:
        domains = [[domain(n, f"d{n}", "EXTERNAL") for n in range(len(steps))] for _, steps, _ in cases]
        units = [
            Unit(f"begin-{tx}", [started(tx), begun(tx, tx, domains=of)]) for tx, of in zip(names, domains, strict=True)
        ]
        assert all_committed(await writer.commit(units))
        for tx, (state, steps, _) in zip(names, cases, strict=True):
            sql(url, f"UPDATE transactions SET state = '{state}' WHERE tx_id = ?", tx)
            for n, step in enumerate(steps):
                sql(url, f"UPDATE steps SET state = '{step}' WHERE tx_id = ? AND n = {n}", tx)
        outcomes = await writer.commit([Unit(f"move-{record.fields['tx_id']}", [record]) for _, _, record in cases])
    assert {type(outcome) for outcome in outcomes} <= {Committed, GuardFailed}
    return [isinstance(outcome, Committed) for outcome in outcomes]


def allows_tx(move: TxMove, state: TxState, steps: Sequence[StepState]) -> bool:
    try:
        return state is move.source and bool(move_tx(state, move.target, steps))
    except IllegalTransition:
        return False


def allows_step(move: StepMove, state: TxState, step: StepState) -> bool:
    try:
        return bool(move_step(step, move.target, state))
    except IllegalTransition:
        return False


@pytest.mark.parametrize("move", TX_MOVES, ids=lambda move: move.name)
async def test_a_transaction_moves_only_from_its_state_and_with_its_steps_as_demanded(
    sqlite_url: str, move: TxMove
) -> None:
    """Every state of the transaction, every state of a step, and two steps of which one is DONE or PARKED."""
    ground = [(state, steps) for state in TxState for steps in (STEPS if state is move.source else STEPS[:8])]
    cases: list[Case] = [(*stands, moves(f"tx-{n}", move)) for n, stands in enumerate(ground)]
    taken = await recorded(sqlite_url, cases)
    assert taken == [allows_tx(move, state, steps) for state, steps in ground]
    assert any(taken) and not all(taken)


@pytest.mark.parametrize("move", STEP_MOVES, ids=lambda move: move.name)
async def test_a_step_moves_only_from_its_states_and_within_its_transactions_state(
    sqlite_url: str, move: StepMove
) -> None:
    ground = list(product(TxState, StepState))
    cases: list[Case] = [
        (state, [step], moved(f"tx-{n}", move.name, run=f"tx-{n}")) for n, (state, step) in enumerate(ground)
    ]
    taken = await recorded(sqlite_url, cases)
    assert taken == [allows_step(move, state, step) for state, step in ground]
    assert any(taken) and not all(taken)


async def test_nothing_moves_under_another_epoch(sqlite_url: str) -> None:
    """Neither an older nor a newer one than the transaction's own, whatever else fits."""
    cases: list[Case] = []
    for wrong in (0, 2):
        for move in TX_MOVES:
            steps = [min(move.some or move.every or {StepState.DONE})]
            cases.append((move.source, steps, moves(f"tx-{len(cases)}", move, wrong)))
        for step in STEP_MOVES:
            tx = f"tx-{len(cases)}"
            cases.append((step.within, [min(step.sources)], moved(tx, step.name, run=tx, epoch=wrong)))
    assert await recorded(sqlite_url, cases) == [False] * len(cases)


async def test_only_what_is_in_flight_is_claimed_and_under_the_next_epoch_alone(sqlite_url: str) -> None:
    ground = list(product(TxState, (1, 2, 3)))
    cases: list[Case] = [
        (state, [StepState.INTENT], claimed(f"tx-{n}", epoch, f"tx-{n}")) for n, (state, epoch) in enumerate(ground)
    ]
    assert await recorded(sqlite_url, cases) == [state.in_flight and epoch == 2 for state, epoch in ground]
