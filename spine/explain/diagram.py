"""The state diagrams of transactions and steps, drawn from the transition table (Mermaid's state diagram syntax)."""

from __future__ import annotations

from collections.abc import Iterable

from spine.governance.transactions import STEP_MOVES, TX_MOVES, StepState, TxState


def transaction_diagram() -> str:
    """The moves of a transaction, each with what it demands of the steps."""
    lines = ["stateDiagram-v2", f"    [*] --> {TxState.EXECUTING}: begin"]
    for move in TX_MOVES:
        demands = [f"every step {_words(move.every)}"] if move.every else []
        demands += [f"some step {_words(move.some)}"] if move.some else []
        shown = f" ({', '.join(demands)})" if demands else ""
        lines.append(f"    {move.source} --> {move.target}: {move.name}{shown}")
    lines += [f"    {state} --> [*]" for state in TxState if state.final]
    return "\n".join(lines)


def step_diagram() -> str:
    """The moves of one step, each with the state its transaction must be in."""
    lines = ["stateDiagram-v2", f"    [*] --> {StepState.PLANNED}: begin"]
    lines += [
        f"    {source} --> {move.target}: {move.name} ({move.within})"
        for move in STEP_MOVES
        for source in sorted(move.sources)
    ]
    return "\n".join(lines)


def _words(states: Iterable[StepState]) -> str:
    return " or ".join(sorted(states))
