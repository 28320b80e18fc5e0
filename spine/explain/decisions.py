"""The authority decisions of a run, each with the rules that made it and the end it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spine.explain.story import LATE, JournalRow, Story, flag_of, items_of, text_of

_RULE_FIELDS = ("id", "version", "mode", "outcome", "determined")


@dataclass(frozen=True, slots=True)
class DecisionLine:
    """One authority decision and its end; times are milliseconds, ``None`` where nothing is recorded."""

    seq: int
    operation: str | None
    allowed: bool | None
    degraded: bool | None
    code: str | None
    reason: str | None
    rules: list[dict[str, Any]]
    missing_inputs: list[str]
    outcome: dict[str, Any] | None
    effect: str | None = None
    would_have: Mapping[str, Any] | None = None
    error: str | None = None
    final: bool = False
    late: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as ``why --json`` shows it."""
        return {
            "seq": self.seq,
            "operation": self.operation,
            "allowed": self.allowed,
            "degraded": self.degraded,
            "code": self.code,
            "reason": self.reason,
            "rules": [{name: rule.get(name) for name in _RULE_FIELDS} for rule in self.rules],
            "missing_inputs": self.missing_inputs,
            "outcome": self.outcome,
        }


def decision_lines(story: Story) -> list[DecisionLine]:
    """Return the run's decisions in journal order, a refused start among them."""
    refused = [story.refused_start] if story.refused_start is not None else []
    return [_decision(row, story) for row in [*refused, *story.decisions]]


def _decision(row: JournalRow, story: Story) -> DecisionLine:
    body = row.body
    ended = story.outcomes.get(str(body.get("decision_id")))
    outcome = None
    if ended is not None:
        outcome = {
            "success": flag_of(ended.body, "success"),
            "error_code": text_of(ended.body, "error_code"),
            "queue_ms": _ms(ended.body.get("queue_us")),
            "handle_ms": _ms(ended.body.get("handle_us")),
        }
    would_have = body.get("would_have")
    return DecisionLine(
        seq=row.seq,
        operation=text_of(body, "operation"),
        allowed=flag_of(body, "allowed"),
        degraded=flag_of(body, "degraded"),
        code=text_of(body, "code"),
        reason=text_of(body, "reason"),
        rules=[rule for rule in items_of(body, "rules") if isinstance(rule, dict)],
        missing_inputs=[str(name) for name in items_of(body, "missing_inputs")],
        outcome=outcome,
        effect=text_of(body, "effect"),
        would_have=would_have if isinstance(would_have, dict) else None,
        error=None if ended is None else text_of(ended.body, "error"),
        final=body.get("final") is True or body.get("allowed") is False,
        late=ended is not None and ended.body.get("kind") == LATE,
    )


def _ms(value: Any) -> float | None:
    return round(value / 1000, 3) if isinstance(value, int | float) and not isinstance(value, bool) else None
