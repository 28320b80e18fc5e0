"""The model of run completion holds in all its states, each of its mutants breaks, and the table decides both."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from spine.governance.transactions import (
    STEP_MOVES,
    TX_MOVES,
    IllegalTransition,
    StepState,
    TxState,
    move_step,
    move_tx,
)
from tests.properties import protocol_model
from tests.properties.explorer import Move, search
from tests.properties.protocol import Flaw, Protocol, State, Table
from tests.properties.protocol_model import (
    AGREES,
    CHAINED,
    CLEAN,
    INVARIANTS,
    LAWS,
    MUTANTS,
    ORDER,
    RECORD,
    WAYS,
    WHOLE,
    Mutant,
    left_alone,
    search_base,
    search_mutant,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("chained", [False, True], ids=["independent effects", "one stands on the other"])
@pytest.mark.parametrize(
    ("epochs", "coordinators"),
    [
        pytest.param(2, 2, id="one takeover from a coordinator that does not notice"),
        pytest.param(4, 1, id="three takeovers from coordinators that crashed"),
    ],
)
def test_every_invariant_holds_and_every_state_has_a_way_on(epochs: int, coordinators: int, chained: bool) -> None:
    """A bounded search; `python -m tests.properties.protocol_model` does three takeovers of both kinds."""
    found = search_base(epochs, coordinators, chained=chained)
    assert found.broken is None, found.trace
    assert {way.name: way.missed(found, epochs) for way in WAYS} == {way.name: 0 for way in WAYS}
    # It comes everywhere, and takes every move of the table, for each step.
    assert {state.rows.tx for state in found.states} == {state.value for state in TxState}
    assert {step for state in found.states for step in state.rows.steps} == {state.value for state in StepState}
    assert {move.name for move in TX_MOVES} <= found.taken
    assert {f"{move.name} {i}" for move in STEP_MOVES for i in (0, 1)} <= found.taken


def test_the_mutants_are_the_eight() -> None:
    assert sorted(mutant.name for mutant in MUTANTS) == [
        "compensating only DONE",
        "no fencing",
        "no intent before send",
        "no tombstone",
        "parked treated as aborted",
        "publishing early",
        "rollback before a durable abort",
        "skipping REFUSED",
    ]


@pytest.mark.timeout(300)  # found out in a second; one that survives is searched to its end
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mutant_is_found_out(mutant: Mutant) -> None:
    """With all epochs, and by what it does to effects, events or rows, not only to names of states."""
    found = search_mutant(mutant)
    assert found.broken == mutant.breaks
    assert found.trace


@pytest.mark.parametrize(
    ("name", "breaks"),
    [
        # A coordinator decides from what it knows; another may have written since.
        ("no fencing", CLEAN),
        ("no intent before send", RECORD),
        ("rollback before a durable abort", RECORD),
        ("skipping REFUSED", AGREES),
    ],
)
def test_the_mutant_breaks_this_too(name: str, breaks: str) -> None:
    assert search_mutant(next(mutant for mutant in MUTANTS if mutant.name == name), breaks).broken == breaks


def test_every_invariant_is_broken_by_some_mutant() -> None:
    """None is a sentence that nothing could break; the last two are seen broken above."""
    assert {mutant.breaks for mutant in MUTANTS} | {RECORD, AGREES} == {*INVARIANTS, *LAWS}


def moved(name: str, **changes: object) -> Table:
    """The table with the moves called ``name`` changed so far as they have such fields."""

    def change(move):
        fields = {key: value for key, value in changes.items() if hasattr(move, key)}
        return replace(move, **fields) if move.name == name else move

    return Table([change(move) for move in TX_MOVES], [change(move) for move in STEP_MOVES])


UNDO = next(move.sources for move in STEP_MOVES if move.name == "undo")


@pytest.mark.parametrize(
    ("table", "broken"),
    [
        pytest.param(moved("commit", every=frozenset()), WHOLE, id="commit asks for nothing"),
        pytest.param(moved("compensated", every=frozenset()), CLEAN, id="ABORTED asks for nothing"),
        pytest.param(left_alone(StepState.UNKNOWN), CLEAN, id="an unknown step is not undone"),
    ],
)
def test_another_table_breaks_the_model(table: Table, broken: str) -> None:
    assert search_mutant(Mutant("another table", broken, table=table)).broken == broken


@pytest.mark.parametrize(
    ("table", "missed"),
    [
        pytest.param(
            moved("undo", sources=UNDO - {StepState.REFUSED}), [True, True], id="nothing leads on from REFUSED"
        ),
        pytest.param(moved("undo", sources=UNDO - {StepState.PARKED}), [False, True], id="retry undoes no parked step"),
    ],
)
def test_another_table_leaves_states_without_a_way_on(table: Table, missed: list[bool]) -> None:
    found = search(Protocol(4, 1, table=table), {}, {})
    assert [way.missed(found, 4) > 0 for way in WAYS] == missed


@pytest.mark.parametrize("late", ["forward", "rollback"])
def test_what_the_operator_resolved_may_still_change(late: str) -> None:
    """A limit that `docs/protocol.md` names: only a tombstone stops what is under way, and a parked step has none."""

    def stays(before: State, move: Move[State]) -> bool:
        return before.rows.tx != TxState.ABORTED_MANUAL or not move.what.startswith(f"{late} is applied")

    assert search(Protocol(2), {}, {"what is resolved stays": stays}).broken


def test_effects_that_do_not_stand_on_each_other_are_undone_in_any_order() -> None:
    """A parked rollback holds up only what it was declared to come after; so `chained` is what makes this hold."""
    assert search(Protocol(2), {ORDER: CHAINED[ORDER]}, {}).broken == ORDER


def test_the_model_reads_the_table_as_the_coordinator_does() -> None:
    """What the model finds allowed under some name is exactly what ``move_tx`` and ``move_step`` allow."""
    table = Table()
    for source, target, *steps in product(TxState, TxState, StepState, StepState):
        found = {table.tx(move.name, source.value, tuple(s.value for s in steps)) for move in TX_MOVES}
        assert (target.value in found) == allows(move_tx, source, target, steps), (source, target, steps)
    for within, state, to in product(TxState, StepState, StepState):
        found = {table.step(move.name, within.value, state.value) for move in STEP_MOVES}
        assert (to.value in found) == allows(move_step, state, to, within), (within, state, to)
    assert table.driven == {"EXECUTING", "COMPENSATING"}


def allows(move, *arguments: object) -> bool:
    try:
        move(*arguments)
    except IllegalTransition:
        return False
    return True


def test_the_command_prints_the_verdicts() -> None:
    """From the repository's root; here the base to one epoch only."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.properties.protocol_model", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("holds: ") == len(INVARIANTS) + len(CHAINED) + 2 * (len(LAWS) + len(WAYS))
    assert [line.split(" (")[0] for line in ran.stdout.splitlines() if line.startswith("mutant")] == [
        f"mutant: {mutant.name}" for mutant in MUTANTS
    ]
    assert ran.stdout.count("breaks: ") == len(MUTANTS)


def test_a_broken_base_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(protocol_model, "Protocol", partial(Protocol, flaw=Flaw.NO_TOMBSTONE))
    monkeypatch.setattr(protocol_model, "MUTANTS", ())
    assert protocol_model.main(2) == 1
    printed = capsys.readouterr().out
    assert f"BROKEN: {CLEAN}" in printed
    assert "forward is applied 0" in printed


def test_a_surviving_mutant_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol_model, "EPOCHS", 1)
    monkeypatch.setattr(protocol_model, "MUTANTS", (Mutant("nothing wrong", WHOLE),))
    assert protocol_model.main(1) == 1
    assert f"SURVIVES, and should break: {WHOLE}" in capsys.readouterr().out
