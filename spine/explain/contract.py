"""What was promised for a run against what was acknowledged, computed from the run's rows and the time now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spine.explain.story import Story, items_of, text_of
from spine.governance.contract import Ack, AckStatus, Due, Expectation, reconcile


def contract(story: Story, *, now_us: int) -> dict[str, Any] | None:
    """Reconcile the expectations declared at the start with the acknowledgements, or ``None`` when none were declared.

    Each expectation is ``met`` or has its finding: ``missing``, ``failed``, ``stale`` or ``pending``; what was
    acknowledged without having been promised is ``drift``. Times are unix microseconds.
    """
    if story.started is None:
        return None
    declared = items_of(story.started.body, "expectations")
    dues = [due for due in (_due(entry, story.started.body.get("at")) for entry in declared) if due is not None]
    if not dues:
        return None
    found = reconcile(dues, [ack for ack in (_ack(row.body) for row in story.acks) if ack is not None], now_us)
    verdicts = {
        (finding.domain, finding.action): finding.verdict
        for findings in (found.missing, found.failed, found.stale, found.pending)
        for finding in findings
    }
    entries: list[dict[str, Any]] = [
        _entry(due.domain, due.action, due.deadline_at, verdicts.get((due.domain, due.action), "met")) for due in dues
    ]
    entries += [_entry(finding.domain, finding.action, None, finding.verdict) for finding in found.drift]
    return {"expectations": entries, "overall": found.overall.value}


def _entry(domain: str, action: str, deadline_at: int | None, status: str) -> dict[str, Any]:
    return {"domain": domain, "action": action, "deadline_at": deadline_at, "status": status}


def _due(entry: Any, started_at: Any) -> Due | None:
    """The promise as recorded; ``None`` for an entry that is no promise, which only forgery leaves."""
    if not isinstance(entry, Mapping):
        return None
    domain, action = text_of(entry, "domain"), text_of(entry, "action")
    if domain is None or action is None:
        return None
    deadline_at, seconds = entry.get("deadline_at"), entry.get("deadline_s")
    if isinstance(deadline_at, int):
        return Due(domain, action, deadline_at)
    if isinstance(seconds, int | float) and isinstance(started_at, int):
        return Expectation(domain, action, seconds).due(started_at)
    return None


def _ack(body: Mapping[str, Any]) -> Ack | None:
    domain, action, status = text_of(body, "domain"), text_of(body, "action"), body.get("status")
    if domain is None or action is None or status not in tuple(AckStatus):
        return None
    result_id, error, tx_id = text_of(body, "result_id"), text_of(body, "error"), text_of(body, "tx_id")
    return Ack(domain, action, AckStatus(status), result_id, error, tx_id)
