"""What must hold of the protocol of run completion, and the mutants that show that it would be seen if it did not.

python -m tests.properties.protocol_model    searches the whole, and prints each mutant's shortest counterexample
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from spine.governance.transactions import STEP_MOVES, TX_MOVES, StepState, TxState
from tests.properties.explorer import Invariants, Laws, Move, Search, search
from tests.properties.protocol import Far, Flaw, Protocol, S, State, T, Table

# What a transaction may see in the whole search: its own epoch, and three claims or retries.
EPOCHS = 4


def _committed_whole(s: State) -> bool:
    return s.rows.tx != T["COMMITTED"] or all(far & Far.LIVE for far in s.far)


def _aborted_clean(s: State) -> bool:
    return s.rows.tx != T["ABORTED"] or not any(far & Far.LIVE for far in s.far)


def _events_after_commit(s: State) -> bool:
    return s.rows.tx == T["COMMITTED"] or not (s.published or s.rows.outbox)


def _calls_after_record(s: State) -> bool:
    undecided = s.rows.tx == T["EXECUTING"] or s.rows.tx == T["COMMITTED"]
    return not any(
        (step == S["PLANNED"] and far) or (undecided and far & (Far.ROLLBACK | Far.UNDONE))
        for step, far in zip(s.rows.steps, s.far, strict=True)
    )


# Said here once more, for a wrong table must not be its own judge.
_ENDS = {
    T["COMMITTED"]: {S["DONE"]},
    T["ABORTED"]: {S["PLANNED"], S["ROLLED_BACK"]},
    T["PARKED"]: {S["PLANNED"], S["ROLLED_BACK"], S["PARKED"], S["DONE"]},
    T["ABORTED_MANUAL"]: {S["PLANNED"], S["ROLLED_BACK"], S["PARKED"], S["DONE"]},
}


def _end_agrees(s: State) -> bool:
    """Where something is parked, only what comes before it may still be DONE."""
    tx, steps = s.rows.tx, s.rows.steps
    kept = tx != T["COMMITTED"] and S["DONE"] in steps
    return tx not in _ENDS or (
        _ENDS[tx].issuperset(steps) and not (kept and S["PARKED"] not in steps[steps.index(S["DONE"]) :])
    )


def _undone_in_reverse(s: State) -> bool:
    first, second = s.far
    return not (first & Far.UNDONE and second & Far.LIVE)


def _fenced(before: State, move: Move[State]) -> bool:
    return move.by in (0, before.rows.epoch) or move.after.rows == before.rows


WHOLE = "COMMITTED: every effect is live"
CLEAN = "ABORTED: no effect is live, nor made so by what arrives later"
EVENTS = "nothing is in the outbox or published without COMMITTED"
RECORD = "no forward before its intent, no rollback before the abort decision"
AGREES = "an end and PARKED agree with the states of the steps"
ORDER = "no effect is undone while one that stands on it is live"
FENCED = "no row changes under a stale epoch"
INVARIANTS: Invariants[State] = {
    WHOLE: _committed_whole,
    CLEAN: _aborted_clean,
    EVENTS: _events_after_commit,
    RECORD: _calls_after_record,
    AGREES: _end_agrees,
}
CHAINED: Invariants[State] = {**INVARIANTS, ORDER: _undone_in_reverse}
LAWS: Laws[State] = {FENCED: _fenced}


def _ended(s: State) -> bool:
    return s.published if s.rows.tx == T["COMMITTED"] else s.rows.tx in _ENDS


def _settled(s: State) -> bool:
    return s.rows.tx == T["COMMITTED"] or s.rows.tx == T["ABORTED"]


@dataclass(frozen=True)
class Way:
    """From every state with so many claims ``left`` a ``goal`` can be reached, unless the operator resolved it."""

    name: str
    left: int
    goal: Callable[[State], bool]

    def missed(self, found: Search[State], epochs: int) -> int:
        """How many states have no such way."""
        return sum(
            epochs - s.rows.epoch >= self.left and s.rows.tx != T["ABORTED_MANUAL"] for s in found.without(self.goal)
        )


WAYS = (
    Way("with a claim left, an end: published, ABORTED, PARKED or ABORTED_MANUAL", 1, _ended),
    # Whoever takes the transaction over may park it once more; the operator's retry must lead on.
    Way("with two left, COMMITTED or ABORTED: being parked is no trap", 2, _settled),
)


@dataclass(frozen=True)
class Mutant:
    """A protocol with one thing wrong, and what that must break."""

    name: str
    breaks: str
    flaw: Flaw | None = None
    table: Table = field(default_factory=Table)


def left_alone(*states: StepState) -> Table:
    """The table where steps in ``states`` are never undone, and are no hindrance to ABORTED."""
    return Table(
        [replace(m, every=m.every.union(states)) if m.target is TxState.ABORTED else m for m in TX_MOVES],
        [
            replace(m, sources=m.sources.difference(states)) if m.target is StepState.RB_INTENT else m
            for m in STEP_MOVES
        ],
    )


MUTANTS = (
    Mutant("no tombstone", CLEAN, Flaw.NO_TOMBSTONE),
    Mutant("no intent before send", CLEAN, Flaw.SEND_BEFORE_INTENT),
    Mutant(
        "compensating only DONE",
        CLEAN,
        table=left_alone(StepState.INTENT, StepState.REFUSED, StepState.UNKNOWN),
    ),
    Mutant("skipping REFUSED", CLEAN, table=left_alone(StepState.REFUSED)),
    Mutant("rollback before a durable abort", WHOLE, Flaw.ROLLBACK_BEFORE_ABORT),
    Mutant("publishing early", EVENTS, Flaw.PUBLISH_EARLY),
    Mutant("parked treated as aborted", CLEAN, table=left_alone(StepState.PARKED)),
    Mutant("no fencing", FENCED, Flaw.NO_FENCING),
)


def search_base(epochs: int, coordinators: int = 2, *, chained: bool) -> Search[State]:
    """Every state of the protocol as it is."""
    return search(Protocol(epochs, coordinators, chained=chained), CHAINED if chained else INVARIANTS, LAWS)


def search_mutant(mutant: Mutant, breaks: str | None = None) -> Search[State]:
    """The mutant with all epochs, until what it must break is broken."""
    watched = breaks or mutant.breaks
    return search(
        Protocol(EPOCHS, table=mutant.table, flaw=mutant.flaw),
        {name: holds for name, holds in INVARIANTS.items() if name == watched},
        {name: holds for name, holds in LAWS.items() if name == watched},
    )


def main(epochs: int = EPOCHS) -> int:
    """Print the whole; 1 where the protocol breaks something or a mutant does not."""
    bases = [_print_base(epochs, chained=chained) for chained in (False, True)]
    mutants = [_print_mutant(mutant) for mutant in MUTANTS]
    return 0 if all(bases) and all(mutants) else 1


def _print_base(epochs: int, *, chained: bool) -> bool:
    began = time.perf_counter()
    found = search_base(epochs, chained=chained)
    effects = "the second standing on the first" if chained else "independent"
    print(f"protocol, effects {effects}: {len(found.states):,} states, {len(found.edges):,} moves, {epochs} epochs")
    if found.broken:
        print(f"  BROKEN: {found.broken}")
        _print_trace(found)
        return False
    for name in (*(CHAINED if chained else INVARIANTS), *LAWS):
        print(f"  holds: {name}")
    ways = {way.name: way.missed(found, epochs) for way in WAYS}
    for name, missed in ways.items():
        print(f"  {f'MISSED by {missed:,} states' if missed else 'holds'}: {name}")
    print(f"  {time.perf_counter() - began:.1f} s")
    return not any(ways.values())


def _print_mutant(mutant: Mutant) -> bool:
    began = time.perf_counter()
    found = search_mutant(mutant)
    print(f"mutant: {mutant.name} ({len(found.states):,} states, {time.perf_counter() - began:.1f} s)")
    print(f"  breaks: {found.broken}" if found.broken else f"  SURVIVES, and should break: {mutant.breaks}")
    _print_trace(found)
    return found.broken is not None


def _print_trace(found: Search[State]) -> None:
    for number, line in enumerate(found.trace, 1):
        print(f"    {number:2} {line}")


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
