"""Why a run ended as it did: journal rows in, one explanation out; nothing is read, nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spine.built_in import outcome_of
from spine.explain.cause import Cause, find_cause
from spine.explain.contract import contract
from spine.explain.decisions import DecisionLine, decision_lines
from spine.explain.remedy import next_step
from spine.explain.story import (
    ABORTED_STATES,
    COMMITTED,
    PARKED,
    Attempt,
    JournalRow,
    Step,
    Story,
    flag_of,
    read,
    text_of,
)
from spine.explain.text import Line, explanation_lines
from spine.governance.transactions import StepState
from spine.kernel.errors import with_code

EXIT_CODES = {"succeeded": 0, "denied": 3, "failed": 4, "rolled_back": 4, "parked": 4, "pending": 5}
EXIT_NOT_FOUND = 6
EXIT_EVIDENCE_BROKEN = 7


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer to ``why``: a verdict with exactly one cause, what led to it, the evidence, and what to do next."""

    run_id: str
    tenant_id: str | None
    verdict: str
    cause: Cause
    decisions: list[DecisionLine]
    transaction: dict[str, Any] | None
    contract: dict[str, Any] | None
    events: list[dict[str, Any]]
    evidence: dict[str, Any]
    next: str
    notes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """The exit code of ``spine why`` for this answer."""
        return EXIT_EVIDENCE_BROKEN if self.evidence["intact"] is False else EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as ``why --json`` shows it."""
        return {
            "run_id": self.run_id,
            "tenant_id": self.tenant_id,
            "verdict": self.verdict,
            "cause": self.cause.to_dict(),
            "decisions": [decision.to_dict() for decision in self.decisions],
            "transaction": self.transaction,
            "contract": self.contract,
            "events": self.events,
            "evidence": self.evidence,
            "next": self.next,
        }

    def __str__(self) -> str:
        """Render the answer as plain text, verdict and cause in the first two lines."""
        return "\n".join(line for _, line in self.lines())

    def lines(self) -> list[Line]:
        """Return the text with a style name for each line."""
        return explanation_lines(self.to_dict(), self.decisions, self.notes, self.others)


def explain(
    rows: Sequence[JournalRow],
    *,
    now_us: int,
    intact: bool | None = None,
    run_id: str | None = None,
    stream: str = "main",
) -> Explanation:
    """Explain the run whose journal rows these are, in journal order.

    ``now_us`` is unix microseconds and only tells whether a promised deadline has passed; ``intact`` is the result of
    checking the rows' hashes, ``None`` when nobody checked; ``run_id`` is needed only when no body tells it. Raises
    ``LookupError`` when there are no rows.
    """
    story = read(rows)
    if not story.rows:
        raise LookupError(f"no journal row tells of run {run_id!r}: check its id, spine runs lists those there are")
    found = _verdict(story)
    cause = find_cause(story, found)
    return Explanation(
        run_id=run_id or story.run_id or "unknown",
        tenant_id=story.tenant_id,
        verdict=found,
        cause=cause,
        decisions=decision_lines(story),
        transaction=_transaction(story),
        contract=contract(story, now_us=now_us),
        events=_events(story),
        evidence={"stream": stream, "first": story.first, "last": story.last, "intact": intact},
        next=next_step(story, found, cause, intact=intact),
        notes=_notes(story),
        others=_others(story),
    )


def verdict(rows: Sequence[JournalRow]) -> str:
    """Return the first that applies: parked, rolled_back, denied, failed, succeeded, else pending."""
    return _verdict(read(rows))


def kept(rows: Sequence[JournalRow], *, now_us: int) -> str | None:
    """Return the verdict over what the run promised, as of ``now_us`` (unix microseconds), or ``None`` for nothing."""
    found = contract(read(rows), now_us=now_us)
    return None if found is None else str(found["overall"])


def _verdict(story: Story) -> str:
    if story.in_state(PARKED):
        return "parked"
    if story.in_state(*ABORTED_STATES):
        return "rolled_back"
    if any(attempt.in_flight for attempt in story.latest()):
        return "pending"
    committed = story.in_state(COMMITTED)
    if committed is not None and _is_success(committed.run_status):
        return "succeeded"
    if story.denials():
        return "denied"
    return "failed" if committed is not None else "pending"


def _is_success(run_status: str | None) -> bool:
    return run_status is not None and outcome_of(run_status).name == "SUCCESS"


def _transaction(story: Story) -> dict[str, Any] | None:
    attempt = _shown_attempt(story)
    if attempt is None:
        return None
    domains = [
        {"name": s.name, "class": s.cls, "state": _state(story, s), "result_id": s.result_id, "error": s.error}
        for _, s in sorted(attempt.steps.items())
    ]
    return {"state": attempt.state, "phase": attempt.phase, "domains": domains}


def _state(story: Story, step: Step) -> str:
    """A step's state; a POST domain has done its part when its delivery is recorded."""
    return "DONE" if step.effect_id is not None and step.effect_id in story.published else step.state


def _shown_attempt(story: Story) -> Attempt | None:
    latest = story.latest()
    return story.in_state(PARKED) or story.in_state(*ABORTED_STATES) or (latest[-1] if latest else None)


def _events(story: Story) -> list[dict[str, Any]]:
    return [
        {
            "event_id": text_of(row.body, "event_id"),
            "type": text_of(row.body, "type"),
            "published": str(row.body.get("event_id")) in story.published,
        }
        for row in story.events
    ]


def _notes(story: Story) -> list[str]:
    """What the text adds about the start and the attempts, which the JSON shape has no place for."""
    notes = []
    if story.started is not None:
        agent = text_of(story.started.body, "agent_id")
        how = "implicitly, by its first call" if story.started.body.get("implicit") else "by start_run"
        notes.append(f"started {how}" + (f", agent {agent}" if agent else "") + f" (journal #{story.started.seq})")
        decision = story.started.body.get("decision")
        if isinstance(decision, Mapping) and decision.get("degraded"):
            notes.append(f"the start was flagged degraded: {decision.get('reason') or 'unknown'}")
    attempt = _shown_attempt(story)
    if attempt is not None and attempt.begun is not None and flag_of(attempt.begun.body, "authority_degraded"):
        notes.append(f"the completion was flagged: {text_of(attempt.begun.body, 'authority_reason') or 'unknown'}")
    notes += [f"taken over under epoch {attempt.epoch}"] if attempt is not None and attempt.epoch > 1 else []
    if len(story.attempts) > 1:
        notes.append(f"{len(story.attempts)} attempts to complete it are recorded")
    return notes


def _others(story: Story) -> list[str]:
    """Every attempt that is not the one shown, in a line: what ended it, and what was undone of it."""
    shown = _shown_attempt(story)
    others = [attempt for attempt in story.attempts.values() if attempt is not shown]
    return [_ending(attempt) for attempt in sorted(others, key=lambda attempt: attempt.seq)]


def _ending(attempt: Attempt) -> str:
    told = f"#{attempt.seq} {attempt.state}"
    if attempt.completion_key:
        told += f" under key {attempt.completion_key!r}"
    for state, what in ((StepState.ROLLED_BACK, "rolled back"), (StepState.PARKED, "could not be rolled back")):
        names = [step.name or "unknown" for _, step in sorted(attempt.steps.items()) if step.state == state]
        told += f"; {', '.join(names)} {what}" if names else ""
    row = attempt.aborting or attempt.ended
    if row is None or attempt.state == COMMITTED:
        return told
    # What a domain said comes last: it may be long.
    name, code, error = (text_of(row.body, part) or "unknown" for part in ("failed_domain", "code", "error"))
    return f"{told}; because of domain {name}: {with_code(code, error)}"
