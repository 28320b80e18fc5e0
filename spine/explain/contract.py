"""What was promised for a run against what was acknowledged, computed from the run's rows and the time now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spine.explain.story import JournalRow, Story, items_of, text_of
from spine.governance.contract import PENDING, Ack, AckStatus, Due, moment_of, reconcile

_STATUSES = {status.value: status for status in AckStatus}
_NUMBERS = (int, float)


@dataclass(slots=True)
class Contract:
    """What the rows of a run tell of its contract.

    ``standing`` is the verdict that was recorded last; it holds by itself until ``due_at`` (unix microseconds, ``None``
    for always). ``seq`` is the last row that was judged: a verdict, or a report that left it as it was.
    ``block_unmet`` tells that the run commits only when everything promised is delivered.
    """

    run_id: str
    tenant_id: str
    dues: tuple[Due, ...]
    acks: list[Ack]
    standing: str
    due_at: int | None
    seq: int | None
    block_unmet: bool

    @property
    def kept(self) -> bool:
        """Whether the journal has a row of its contract."""
        return bool(self.dues) and (self.standing != PENDING or self.due_at is not None)


def read_contract(rows: Iterable[JournalRow]) -> Contract | None:
    """Read the contract from rows of one run in journal order, or ``None`` when its start is not among them."""
    found: Contract | None = None
    for row in rows:
        found = take(found, row.body.get("kind"), row.body, at=row.body.get("at"), seq=row.seq)
    return found


def take(
    found: Contract | None, kind: Any, body: Mapping[str, Any], *, at: Any, seq: int | None = None
) -> Contract | None:
    """The contract after one more row of its run; before the start there is none.

    ``at`` is the row's time; ``seq`` its place, ``None`` where it is still to be written.
    """
    if found is None:
        return _started(body, at, seq) if kind == "run.started" else None
    if kind == "ack":
        if body.get("tenant_id") == found.tenant_id and (ack := _ack(body)) is not None:
            found.acks.append(ack)
        found.seq = seq if body.get("contract") is not None else found.seq
    elif kind == "contract.reconciled":
        found.standing, found.due_at, found.seq = str(body.get("overall")), _moment(body.get("due_at")), seq
    return found


def _started(body: Mapping[str, Any], at: Any, seq: int | None) -> Contract:
    return Contract(
        run_id=text_of(body, "run_id") or "",
        tenant_id=text_of(body, "tenant_id") or "",
        dues=_dues(body, at),
        acks=[],
        standing=PENDING,
        due_at=_moment(body.get("due_at")),
        seq=seq,
        block_unmet=body.get("block_unmet") is True,
    )


def contract(story: Story, *, now_us: int) -> dict[str, Any] | None:
    """Reconcile the expectations declared at the start with the acknowledgements, or ``None`` when none were declared.

    Each expectation is ``met`` or has its finding: ``missing``, ``failed``, ``stale`` or ``pending``; what was
    acknowledged without having been promised is ``drift``. Times are unix microseconds.
    """
    if story.started is None:
        return None
    dues = _dues(story.started.body, story.started.body.get("at"))
    if not dues:
        return None
    acks = [ack for ack in (_ack(row.body) for row in story.acks) if ack is not None]
    found = reconcile(dues, acks, now_us)
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


def _dues(started: Mapping[str, Any], at: Any) -> tuple[Due, ...]:
    promised = items_of(started, "expectations")
    return tuple([due for entry in promised if (due := _due(entry, at)) is not None])


def _moment(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _due(entry: Any, started_at: Any) -> Due | None:
    """The promise as recorded; ``None`` for an entry that is no promise, which only forgery leaves."""
    if not isinstance(entry, dict):
        return None
    domain, action = text_of(entry, "domain"), text_of(entry, "action")
    if domain is None or action is None:
        return None
    deadline_at, seconds = entry.get("deadline_at"), entry.get("deadline_s")
    later = entry.get("after_commit") is True
    if isinstance(deadline_at, int):
        return Due(domain, action, deadline_at, later)
    if isinstance(seconds, _NUMBERS) and math.isfinite(seconds) and isinstance(started_at, int):
        return Due(domain, action, moment_of(started_at, seconds), later)
    return None


def _ack(body: Mapping[str, Any]) -> Ack | None:
    domain, action, status = text_of(body, "domain"), text_of(body, "action"), _STATUSES.get(str(body.get("status")))
    if domain is None or action is None or status is None:
        return None
    return Ack(domain, action, status, text_of(body, "result_id"), text_of(body, "error"), text_of(body, "tx_id"))
