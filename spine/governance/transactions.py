"""The one transition table of transactions and steps, and the order in which domains take part.

The coordinator only carries out what the table says; the journal's compare-and-set reads its sources from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, TypeVar

from spine.governance.completion import CompleteRun, RunCompletionTransaction, completion_digest, completion_problems
from spine.governance.flags import RAC_ROLLBACK_AUDIT_ENABLED, TRANSACTION_COORDINATOR_ENABLED
from spine.governance.results import (
    CompletionConflict,
    DomainResult,
    RollbackAction,
    RollbackNotSupportedError,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
    moment,
    phase_reached,
)
from spine.kernel.errors import ConfigurationError, SpineError

__all__ = [
    "INTERRUPTED",
    "RAC_ROLLBACK_AUDIT_ENABLED",
    "STALLED",
    "STEP_MOVES",
    "TRANSACTION_COORDINATOR_ENABLED",
    "TX_MOVES",
    "TX_RECORDS",
    "UNDONE_FROM",
    "CompleteRun",
    "CompletionConflict",
    "DomainClass",
    "DomainResult",
    "IllegalTransition",
    "RollbackAction",
    "RollbackNotSupportedError",
    "RunCompletionTransaction",
    "StepMove",
    "StepState",
    "TransactionFailed",
    "TransactionPhase",
    "TransactionResult",
    "TxMove",
    "TxState",
    "completion_digest",
    "completion_problems",
    "moment",
    "move_step",
    "move_tx",
    "phase_reached",
    "plan_order",
    "step_move",
    "tx_move",
]


class TxState(StrEnum):
    """Where a transaction stands."""

    EXECUTING = "EXECUTING"
    COMMITTED = "COMMITTED"
    COMPENSATING = "COMPENSATING"
    ABORTED = "ABORTED"
    PARKED = "PARKED"
    ABORTED_MANUAL = "ABORTED_MANUAL"

    @property
    def final(self) -> bool:
        """Whether no move leaves it."""
        return not any(self is move.source for move in TX_MOVES)

    @classmethod
    def those_in_flight(cls) -> tuple[TxState, ...]:
        """The states in which somebody drives it."""
        return tuple(state for state in cls if state.in_flight)

    @classmethod
    def unended(cls) -> tuple[TxState, ...]:
        """The states that some move leaves."""
        return tuple(state for state in cls if not state.final)

    @property
    def in_flight(self) -> bool:
        """Whether somebody drives it, or must take it over."""
        return self in (TxState.EXECUTING, TxState.COMPENSATING)


class StepState(StrEnum):
    """Where one domain's part of a transaction stands."""

    PLANNED = "PLANNED"
    INTENT = "INTENT"
    DONE = "DONE"
    REFUSED = "REFUSED"
    UNKNOWN = "UNKNOWN"
    RB_INTENT = "RB_INTENT"
    ROLLED_BACK = "ROLLED_BACK"
    PARKED = "PARKED"


class DomainClass(StrEnum):
    """How a domain takes part: in the commit itself, by an effect that can be undone, or after the commit."""

    LOCAL = "LOCAL"
    EXTERNAL = "EXTERNAL"
    POST = "POST"


@dataclass(frozen=True, slots=True)
class TxMove:
    """One move of a transaction.

    ``every`` holds the states all steps must be in; ``some`` those at least one must be in (empty: no demand).
    """

    name: str
    source: TxState
    target: TxState
    every: frozenset[StepState] = frozenset()
    some: frozenset[StepState] = frozenset()


@dataclass(frozen=True, slots=True)
class StepMove:
    """One move of a step, possible only while its transaction is in ``within``."""

    name: str
    sources: frozenset[StepState]
    target: StepState
    within: TxState


_S = StepState
_T = TxState

TX_MOVES: Final = (
    TxMove("commit", _T.EXECUTING, _T.COMMITTED, every=frozenset({_S.DONE})),
    TxMove("abort", _T.EXECUTING, _T.COMPENSATING),
    TxMove("compensated", _T.COMPENSATING, _T.ABORTED, every=frozenset({_S.PLANNED, _S.ROLLED_BACK})),
    TxMove(
        # What a parked step stands on is left as it is, DONE; everything else has been undone by then.
        "park",
        _T.COMPENSATING,
        _T.PARKED,
        every=frozenset({_S.PLANNED, _S.DONE, _S.ROLLED_BACK, _S.PARKED}),
        some=frozenset({_S.PARKED}),
    ),
    TxMove("retry", _T.PARKED, _T.COMPENSATING),
    TxMove("resolve", _T.PARKED, _T.ABORTED_MANUAL),
)

STEP_MOVES: Final = (
    StepMove("intend", frozenset({_S.PLANNED}), _S.INTENT, _T.EXECUTING),
    StepMove("done", frozenset({_S.INTENT}), _S.DONE, _T.EXECUTING),
    StepMove("refused", frozenset({_S.INTENT}), _S.REFUSED, _T.EXECUTING),
    StepMove("unknown", frozenset({_S.INTENT}), _S.UNKNOWN, _T.EXECUTING),
    StepMove(
        # A refused forward is undone too: the network may still deliver its duplicate.
        "undo",
        frozenset({_S.INTENT, _S.DONE, _S.REFUSED, _S.UNKNOWN, _S.PARKED}),
        _S.RB_INTENT,
        _T.COMPENSATING,
    ),
    StepMove("undone", frozenset({_S.RB_INTENT}), _S.ROLLED_BACK, _T.COMPENSATING),
    StepMove("park", frozenset({_S.RB_INTENT}), _S.PARKED, _T.COMPENSATING),
)


# The record of each move of a transaction.
TX_RECORDS: Final = {
    "tx.committed": "commit",
    "tx.aborting": "abort",
    "tx.aborted": "compensated",
    "tx.parked": "park",
    "tx.retried": "retry",
    "tx.resolved": "resolve",
}
_TX_BY_NAME: Final = {move.name: move for move in TX_MOVES}
_STEP_BY_NAME: Final = {move.name: move for move in STEP_MOVES}
# The code of an abort that no domain caused: the process ended, or the Spine was stopped, before one had answered.
INTERRUPTED: Final = "INTERRUPTED"
# The code where one driver after the other ended at the same domain, which is therefore not asked again.
STALLED: Final = "STALLED"
# What may have reached the other system, and is therefore undone; a rollback that was under way goes on.
UNDONE_FROM: Final = _STEP_BY_NAME["undo"].sources | {_S.RB_INTENT}


class IllegalTransition(SpineError):
    """The transition table has no such move from the present state."""


def move_tx(state: TxState, target: TxState, steps: Iterable[StepState]) -> TxState:
    """``target``, if the table allows it from ``state`` with the ``steps`` as they are; else IllegalTransition."""
    present = tuple(steps)
    for move in TX_MOVES:
        if move.source is not state or move.target is not target:
            continue
        wrong = [step.value for step in present if move.every and step not in move.every]
        if wrong:
            allowed = ", ".join(sorted(s.value for s in move.every))
            raise IllegalTransition(f"{move.name}: a transaction needs every step {allowed}; found {', '.join(wrong)}")
        if move.some and not any(step in move.some for step in present):
            needed = ", ".join(sorted(s.value for s in move.some))
            raise IllegalTransition(f"{move.name}: a transaction needs a step that is {needed}")
        return target
    raise IllegalTransition(f"a transaction cannot go from {state.value} to {target.value}")


def move_step(state: StepState, target: StepState, within: TxState) -> StepState:
    """``target``, if the table allows it from ``state`` while the transaction is ``within``; else IllegalTransition."""
    for move in STEP_MOVES:
        if move.target is target and state in move.sources and move.within is within:
            return target
    raise IllegalTransition(f"a step cannot go from {state.value} to {target.value} in a transaction {within.value}")


def tx_move(name: str) -> TxMove:
    """The transaction's move of that name. Raises KeyError."""
    return _TX_BY_NAME[name]


def step_move(name: str) -> StepMove:
    """The step's move of that name. Raises KeyError."""
    return _STEP_BY_NAME[name]


class Ordered(Protocol):
    """What ``plan_order`` needs of a domain."""

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str]: ...


D = TypeVar("D", bound=Ordered)


def plan_order(domains: Sequence[D]) -> tuple[D, ...]:
    """``domains`` so that each comes after those it names; where that leaves a choice, as declared.

    Raises ConfigurationError naming a domain declared twice, an unknown one, or a circle.
    """
    declared = [domain.name for domain in domains]
    for name in declared:
        if declared.count(name) > 1:
            raise ConfigurationError(f"domain {name!r} is declared twice: give each domain its own name")
    waits = {domain.name: set(domain.after) for domain in domains}
    for name, others in waits.items():
        unknown = sorted(others - waits.keys())
        if unknown:
            raise ConfigurationError(
                f"domain {name!r} is to come after {unknown[0]!r}, which is not a domain here; "
                f"declared are: {', '.join(declared)}"
            )
    ordered: list[D] = []
    placed: set[str] = set()
    waiting = list(domains)
    while waiting:
        ready = next((domain for domain in waiting if waits[domain.name] <= placed), None)
        if ready is None:
            raise ConfigurationError(
                f"domains wait for each other in a circle: {' -> '.join(_circle(waiting[0].name, waits, placed))}; "
                "remove one `after`"
            )
        waiting = [domain for domain in waiting if domain is not ready]
        placed.add(ready.name)
        ordered.append(ready)
    return tuple(ordered)


def _circle(start: str, waits: dict[str, set[str]], placed: set[str]) -> list[str]:
    path = [start]
    while True:
        following = min(waits[path[-1]] - placed)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)
