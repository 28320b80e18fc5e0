"""Outcomes that the journal does not take are kept to be recorded later, and no more of them than a bound."""

from __future__ import annotations

from typing import Any

import pytest

from actors.recovery import Recovery
from spine.governance.units import Record

pytestmark = pytest.mark.anyio


async def test_outcomes_that_could_not_be_recorded_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones; the decisions of the others stay open, for the next process to close as interrupted."""
    monkeypatch.setattr("actors.recovery.UNRECORDED_MOST", 2)
    nothing: Any = None
    recovery = Recovery(nothing, nothing, nothing, "i1")
    for n in range(4):
        recovery.remember(Record("outcome", n, {"decision_id": f"d{n}", "run_id": None}))
    assert list(recovery.unrecorded) == ["d0", "d1"]
