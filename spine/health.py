"""What a running Spine tells of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spine.kernel.ledger import LedgerCounts


@dataclass(frozen=True, slots=True)
class Health:
    """A snapshot; ``ok`` is false when the journal takes no writes, supervision failed, or the ledger does not balance.

    ``messages`` is the exactly-one-end account; ``decisions``, ``transactions`` and ``contracts`` (verdicts reached)
    count since the start; ``blocked`` names what held the event loop, ``crashes`` the last crash reports.
    """

    ok: bool
    status: str
    governance: dict[str, Any]
    messages: LedgerCounts
    actors: dict[str, str]
    mailboxes: dict[str, int]
    decisions: dict[str, int]
    transactions: dict[str, int]
    contracts: dict[str, int]
    journal: dict[str, Any]
    restarts: int
    crashes: tuple[dict[str, Any], ...]
    dead_letters: tuple[dict[str, Any], ...]
    blocked: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for an endpoint or a log."""
        return asdict(self) | {"messages": asdict(self.messages) | {"balanced": self.messages.balanced}}
