"""The one cause of a verdict: the journal row that made the run end so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spine.explain.story import ABORTED_STATES, COMMITTED, PARKED, Attempt, JournalRow, Step, Story, text_of
from spine.kernel.errors import with_code

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cause:
    """A code for programs, a sentence for people, and the journal row they come from."""

    code: str
    text: str
    seq: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the cause as ``why --json`` shows it."""
        return {"code": self.code, "text": self.text, "seq": self.seq}


def find_cause(story: Story, verdict: str) -> Cause:
    """Return the cause of ``verdict``; what no row tells is the word ``unknown``."""
    match verdict:
        case "parked":
            return _parked(story)
        case "rolled_back":
            return _rolled_back(story)
        case "denied":
            return _denied(story)
        case "failed":
            return _failed(story)
        case "succeeded":
            return _succeeded(story)
        case _:
            return _pending(story)


def decisive_denial(story: Story) -> JournalRow | None:
    """The denial that the run's own error code names, else the last one before the run ended."""
    denials = story.denials()
    reported = _reported(story.in_state(COMMITTED))[0]
    named = [row for row in denials if reported is not None and row.body.get("code") == reported]
    candidates = named or denials
    return candidates[-1] if candidates else None


def failed_domain(attempt: Attempt | None) -> Step | None:
    """The step that parked, else the one its abort names, else the first that carries an error."""
    if attempt is None:
        return None
    steps = [attempt.steps[n] for n in sorted(attempt.steps)]
    row = attempt.ended or attempt.aborting
    name = text_of(row.body, "failed_domain") if row is not None else None
    for fits in (
        lambda step: step.state == PARKED,
        lambda step: name is not None and step.name == name,
        lambda step: step.error is not None or step.code is not None,
    ):
        for step in steps:
            if fits(step):
                return step
    return None


def _parked(story: Story) -> Cause:
    attempt = story.in_state(PARKED)
    step = failed_domain(attempt)
    ended = attempt.ended if attempt is not None else None
    code = (step.code if step else None) or _field(ended, "code") or "PARKED"
    error = (step.error if step else None) or _field(ended, "error") or UNKNOWN
    name = (step.name if step else None) or _field(ended, "failed_domain") or UNKNOWN
    seq = step.seq if step is not None and step.seq is not None else (ended.seq if ended is not None else None)
    return Cause(code, f"the rollback of domain {name} is parked: {error}{_abort_reason(attempt)}", seq)


def _abort_reason(attempt: Attempt | None) -> str:
    """Why there was something to roll back."""
    aborting = attempt.aborting if attempt is not None else None
    if aborting is None:
        return ""
    name, code, error = (_field(aborting, part) or UNKNOWN for part in ("failed_domain", "code", "error"))
    return f" (it was to be undone because domain {name} ended the completion with {with_code(code, error)})"


def _rolled_back(story: Story) -> Cause:
    attempt = story.in_state(*ABORTED_STATES)
    ended = attempt.ended if attempt is not None else None
    if attempt is not None and attempt.state == "ABORTED_MANUAL":
        who, evidence = _field(ended, "actor") or UNKNOWN, _field(ended, "evidence") or UNKNOWN
        text = f"the completion was undone by hand, says {who}: {evidence}{_abort_reason(attempt)}"
        return Cause(_field(attempt.aborting, "code") or "RESOLVED", text, ended.seq if ended else None)
    step = failed_domain(attempt)
    code = _field(ended, "code") or (step.code if step else None) or UNKNOWN
    error = _field(ended, "error") or (step.error if step else None) or UNKNOWN
    name = _field(ended, "failed_domain") or (step.name if step else None) or UNKNOWN
    return Cause(code, f"the completion was rolled back: domain {name}: {error}", ended.seq if ended else None)


def _denied(story: Story) -> Cause:
    row = decisive_denial(story)
    if row is None:
        return Cause(UNKNOWN, "something was denied, but what is unknown", None)
    operation = text_of(row.body, "operation") or UNKNOWN
    reason = text_of(row.body, "reason") or UNKNOWN
    return Cause(text_of(row.body, "code") or "DENIED", f"{operation} was denied: {reason}", row.seq)


def _failed(story: Story) -> Cause:
    attempt = story.in_state(COMMITTED)
    code, message = _reported(attempt)
    row = _completion_row(attempt)
    if code is None and message is None:
        failure = _last_failure(story)
        if failure is not None:
            operation = text_of(failure.body, "operation") or UNKNOWN
            error = text_of(failure.body, "error") or UNKNOWN
            return Cause(text_of(failure.body, "error_code") or UNKNOWN, f"{operation} failed: {error}", failure.seq)
    status = (attempt.run_status if attempt else None) or UNKNOWN
    text = f"the caller reported the run as {status}: {message or code or 'reason unknown'}"
    return Cause(code or UNKNOWN, text, row.seq if row is not None else None)


def _succeeded(story: Story) -> Cause:
    attempt = story.in_state(COMMITTED)
    row = attempt.ended if attempt is not None else None
    status = (attempt.run_status if attempt else None) or UNKNOWN
    domains = len(attempt.steps) if attempt is not None else 0
    return Cause(
        "SUCCEEDED",
        f"the caller reported the run as {status} and its completion over {domains} "
        f"{'domain' if domains == 1 else 'domains'} is committed",
        row.seq if row is not None else None,
    )


def _pending(story: Story) -> Cause:
    flying = [attempt for attempt in story.latest() if attempt.in_flight]
    if flying:
        text = f"its completion is under way, {flying[-1].state}{_abort_reason(flying[-1])}"
        return Cause(flying[-1].state, text, flying[-1].seq)
    refused = story.refused_completion
    if refused is not None:
        reason = _field(refused, "reason") or UNKNOWN
        return Cause(_field(refused, "code") or "REFUSED", f"its completion was refused: {reason}", refused.seq)
    waiting = story.open_decisions()
    if waiting:
        operation = text_of(waiting[-1].body, "operation") or UNKNOWN
        return Cause("OPERATION_OPEN", f"no end of {operation} is recorded yet", waiting[-1].seq)
    return Cause("NOT_COMPLETED", "no completion of the run is recorded", story.last)


def _last_failure(story: Story) -> JournalRow | None:
    failed = [row for row in story.outcomes.values() if row.body.get("success") is False]
    return failed[-1] if failed else None


def _completion_row(attempt: Attempt | None) -> JournalRow | None:
    return None if attempt is None else attempt.begun or attempt.ended


def _reported(attempt: Attempt | None) -> tuple[str | None, str | None]:
    row = attempt.begun if attempt is not None else None
    return _field(row, "error_code"), _field(row, "error_message")


def _field(row: JournalRow | None, name: str) -> str | None:
    return text_of(row.body, name) if row is not None else None
