"""Answers computed from journal rows alone: why a run ended as it did, and what many runs add up to."""

from __future__ import annotations

from spine.explain.cause import Cause
from spine.explain.totals import Totals, totals
from spine.explain.why import EXIT_CODES, EXIT_EVIDENCE_BROKEN, EXIT_NOT_FOUND, Explanation, explain, kept, verdict

__all__ = [
    "EXIT_CODES",
    "EXIT_EVIDENCE_BROKEN",
    "EXIT_NOT_FOUND",
    "Cause",
    "Explanation",
    "Totals",
    "explain",
    "kept",
    "totals",
    "verdict",
]
