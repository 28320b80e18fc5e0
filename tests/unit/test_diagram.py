"""The diagrams in the docs are those of the transition table."""

from __future__ import annotations

from pathlib import Path

import pytest

from spine.explain.diagram import step_diagram, transaction_diagram
from spine.governance.transactions import STEP_MOVES, TX_MOVES

DOCUMENT = Path(__file__).parents[2] / "docs" / "transactions.md"


@pytest.mark.parametrize(("name", "drawn"), [("transaction", transaction_diagram()), ("step", step_diagram())])
def test_the_document_shows_the_table(name: str, drawn: str) -> None:
    """Whoever changes the table pastes the new diagram between the marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition(f"<!-- {name} diagram -->")[2].partition(f"<!-- /{name} diagram -->")[0]
    assert shown.strip() == f"```mermaid\n{drawn}\n```"


def test_every_move_is_drawn() -> None:
    assert all(f"{move.source} --> {move.target}: {move.name}" in transaction_diagram() for move in TX_MOVES)
    drawn = step_diagram()
    assert all(f"{source} --> {move.target}: {move.name}" in drawn for move in STEP_MOVES for source in move.sources)
