"""What many runs add up to, counted from their journal rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from spine.explain.story import ABORTED_STATES, COMMITTED, PARKED, JournalRow, Story, read


@dataclass(slots=True)
class Totals:
    """Counts over whole runs; ``degraded`` operations are also counted as allowed."""

    runs: int = 0
    operations: int = 0
    allowed: int = 0
    denied: int = 0
    degraded: int = 0
    failed_operations: int = 0
    committed: int = 0
    rolled_back: int = 0
    parked: int = 0
    events: int = 0
    journal_rows: int = 0

    def add(self, other: Totals) -> None:
        """Add the counts of ``other`` to these."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def to_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


def totals(rows: Iterable[JournalRow], *, key_prefix: str | None = None) -> Totals:
    """Count one run's rows.

    An operation that was run again under its key, after an interruption, counts once, as it ended. With ``key_prefix``
    only operations whose idempotency key begins so are counted, and no rows of other operations, of repeated refusals
    to start, or of refused completions: what a caller sends again then counts as often as the first time.
    """
    story = read(rows)
    keyed, others = _by_key(story, key_prefix)
    counted = Totals(runs=1 if story.rows else 0, journal_rows=story.rows, events=len(story.events))
    for row in [*keyed.values(), *(others if key_prefix is None else ())]:
        _count(counted, row, story)
    for attempt in story.latest():
        counted.committed += attempt.state == COMMITTED
        counted.parked += attempt.state == PARKED
        counted.rolled_back += attempt.state in ABORTED_STATES
    if key_prefix is not None:
        ends = sum(str(row.body.get("decision_id")) in story.outcomes for row in others)
        counted.journal_rows -= len(others) + ends + max(story.refusals - 1, 0) + story.refused_completions
    return counted


def _count(counted: Totals, decision: JournalRow, story: Story) -> None:
    body = decision.body
    counted.operations += 1
    if body.get("allowed") is False:
        counted.denied += 1
        return
    counted.allowed += 1
    counted.degraded += body.get("degraded") is True
    outcome = story.outcomes.get(str(body.get("decision_id")))
    counted.failed_operations += outcome is not None and outcome.body.get("success") is False


def _by_key(story: Story, key_prefix: str | None) -> tuple[dict[tuple[str, str], JournalRow], list[JournalRow]]:
    """The last decision of each key that is wanted, and the decisions without one."""
    keyed: dict[tuple[str, str], JournalRow] = {}
    others: list[JournalRow] = []
    for row in story.decisions:
        key = row.body.get("key")
        if isinstance(key, str) and key.startswith(key_prefix or ""):
            keyed[str(row.body.get("operation")), key] = row
        else:
            others.append(row)
    return keyed, others
