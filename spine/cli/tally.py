"""Counts by operation, from one pass over the journal in bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from spine.cli.reading import reading
from spine.explain.story import flag_of, text_of

_PAGE = 1_000
_SAMPLES = 10_000


@dataclass(slots=True)
class Tally:
    """What happened to one operation; the median is of the last 10,000 handler times."""

    allowed: int = 0
    denied: int = 0
    degraded: int = 0
    failed: int = 0
    handled: int = 0
    times_us: array[int] = field(default_factory=lambda: array("q"))

    def decided(self, body: Mapping[str, Any]) -> None:
        """Count a decision."""
        if flag_of(body, "allowed"):
            self.allowed += 1
            self.degraded += flag_of(body, "degraded") is True
        else:
            self.denied += 1

    def ended(self, body: Mapping[str, Any]) -> None:
        """Count an outcome."""
        self.failed += flag_of(body, "success") is False
        time_us = body.get("handle_us")
        if not isinstance(time_us, int):
            return
        if len(self.times_us) < _SAMPLES:
            self.times_us.append(time_us)
        else:
            self.times_us[self.handled % _SAMPLES] = time_us
        self.handled += 1

    def to_dict(self, operation: str) -> dict[str, Any]:
        """Return the counts, and the median handler time in milliseconds or ``None``."""
        return {
            "operation": operation,
            "calls": self.allowed + self.denied,
            "allowed": self.allowed,
            "denied": self.denied,
            "degraded": self.degraded,
            "failed": self.failed,
            "p50_handle_ms": round(median(self.times_us) / 1_000, 3) if self.times_us else None,
        }


async def tally(url: str) -> dict[str, Tally]:
    """Count every operation that the journal at ``url`` has a decision of."""
    found: dict[str, Tally] = {}
    async with reading(url) as reader:
        after = 0
        while rows := await reader.tail(after, _PAGE):
            after = rows[-1].seq
            for row in rows:
                operation, kind = text_of(row.body, "operation"), row.body.get("kind")
                if operation is None or kind not in ("decision", "outcome"):
                    continue
                counted = found.setdefault(operation, Tally())
                if kind == "decision":
                    counted.decided(row.body)
                else:
                    counted.ended(row.body)
    return found
