"""The exactly-one-end account: every admitted envelope is in flight or has had one end, at any instant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from spine.kernel.messages import Envelope


class End(IntEnum):
    """How an envelope ended: an ask by the first four, a tell by the last two."""

    REPLIED = 0
    FAILED = 1
    EXPIRED = 2
    CANCELLED = 3
    HANDLED = 4
    DEAD_LETTERED = 5


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """A snapshot; ``admitted == sum(ended.values()) + in_flight`` always holds."""

    admitted: int
    in_flight: int
    ended: dict[str, int]
    late_replies: int
    refused: int

    @property
    def balanced(self) -> bool:
        """Whether the law holds."""
        return self.admitted == self.in_flight + sum(self.ended.values())


class Ledger:
    """Counts admissions and ends, and keeps what is in flight."""

    __slots__ = ("admitted", "ended", "late_replies", "open", "refused")

    def __init__(self) -> None:
        self.admitted = 0
        self.ended = [0] * len(End)
        self.open: dict[int, Envelope] = {}
        self.late_replies = 0
        self.refused = 0

    def held_by(self, actor: str) -> Iterator[Envelope]:
        """The envelopes that the actor has taken and that have not ended."""
        return (envelope for envelope in list(self.open.values()) if envelope.holder == actor)

    def counts(self) -> LedgerCounts:
        """A snapshot of the account."""
        ended = {end.name.lower(): self.ended[end] for end in End}
        return LedgerCounts(self.admitted, len(self.open), ended, self.late_replies, self.refused)
