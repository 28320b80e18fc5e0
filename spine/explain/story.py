"""The journal rows of one run, sorted into what was decided, what came of it, and how the run was completed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from spine.governance.transactions import TX_RECORDS, TxState, tx_move

# The outcome of an operation whose process had been taken for dead.
LATE = "outcome.late"
COMMITTED = TxState.COMMITTED.value
PARKED = TxState.PARKED.value
ABORTED_STATES = (TxState.ABORTED.value, TxState.ABORTED_MANUAL.value)
# The state in which the record of a move leaves a transaction.
_MOVED_TO = {kind: tx_move(move).target.value for kind, move in TX_RECORDS.items()}


class JournalRow(Protocol):
    """What an explanation needs of a journal row: its place and its body."""

    @property
    def seq(self) -> int: ...

    @property
    def body(self) -> Mapping[str, Any]: ...


@dataclass(slots=True)
class Step:
    """The last recorded state of one domain in one transaction."""

    n: int
    name: str | None
    cls: str | None
    state: str = "PLANNED"
    result_id: str | None = None
    error: str | None = None
    code: str | None = None
    seq: int | None = None
    effect_id: str | None = None


@dataclass(slots=True)
class Attempt:
    """One attempt to complete a run: its rows and the state that the last of them left it in."""

    tx_id: str
    completion_key: str = ""
    begun: JournalRow | None = None
    aborting: JournalRow | None = None
    ended: JournalRow | None = None
    state: str = "EXECUTING"
    phase: str | None = None
    run_status: str | None = None
    epoch: int = 1
    steps: dict[int, Step] = field(default_factory=dict)

    @property
    def in_flight(self) -> bool:
        return self.state not in (COMMITTED, PARKED, *ABORTED_STATES)

    @property
    def seq(self) -> int:
        """Where the attempt begins, or where it is first heard of when its first row is missing."""
        row = self.begun or self.ended
        return row.seq if row is not None else 0


@dataclass(slots=True)
class Story:
    """All that the journal says about one run; fields that no row gives stay ``None``."""

    run_id: str | None = None
    tenant_id: str | None = None
    first: int | None = None
    last: int | None = None
    started: JournalRow | None = None
    refused_start: JournalRow | None = None
    refused_completion: JournalRow | None = None
    decisions: list[JournalRow] = field(default_factory=list)
    outcomes: dict[str, JournalRow] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    acks: list[JournalRow] = field(default_factory=list)
    events: list[JournalRow] = field(default_factory=list)
    published: set[str] = field(default_factory=set)
    rows: int = 0
    refusals: int = 0
    refused_completions: int = 0

    def latest(self) -> list[Attempt]:
        """The latest attempt of each completion key, oldest first: an earlier attempt no longer speaks for the run."""
        by_key: dict[str, Attempt] = {}
        for attempt in sorted(self.attempts.values(), key=lambda attempt: attempt.seq):
            by_key.pop(attempt.completion_key, None)
            by_key[attempt.completion_key] = attempt
        return list(by_key.values())

    def in_state(self, *states: str) -> Attempt | None:
        """The last of the latest attempts that is in one of ``states``."""
        found = [attempt for attempt in self.latest() if attempt.state in states]
        return found[-1] if found else None

    def denials(self) -> list[JournalRow]:
        """Every recorded no: refused operations, and the refused start unless the run was started after it."""
        refused = [row for row in self.decisions if row.body.get("allowed") is False]
        return refused if self.refused_start is None else [self.refused_start, *refused]

    def open_decisions(self) -> list[JournalRow]:
        """Allowed operations of which no end is recorded."""
        return [
            row
            for row in self.decisions
            if row.body.get("allowed") is not False
            and not row.body.get("final")
            and str(row.body.get("decision_id")) not in self.outcomes
        ]


def read(rows: Iterable[JournalRow]) -> Story:
    """Sort the rows of one run, given in journal order, into a story; rows of unknown kind only count as evidence."""
    story = Story()
    rows = list(rows)
    # Before a run exists anybody may be refused under its id: once it does, only its own tenant's rows speak for it.
    owner = next((text_of(row.body, "tenant_id") for row in rows if row.body.get("kind") == "run.started"), None)
    story.tenant_id = owner
    for row in rows:
        body = row.body
        story.rows += 1
        story.run_id = story.run_id or text_of(body, "run_id")
        story.tenant_id = story.tenant_id or text_of(body, "tenant_id")
        story.first = row.seq if story.first is None else min(story.first, row.seq)
        story.last = row.seq if story.last is None else max(story.last, row.seq)
        if owner is None or text_of(body, "tenant_id") in (owner, None):
            _sort(story, row, str(body.get("kind")))
    return story


def _sort(story: Story, row: JournalRow, kind: str) -> None:
    body = row.body
    if kind == "run.started":
        story.started, story.refused_start = row, None
    elif kind == "run.denied":
        story.refusals += 1
        if story.started is None:
            story.refused_start = row
    elif kind == "decision":
        story.decisions.append(row)
    elif kind in ("outcome", LATE):
        # The late one is how it really ended.
        story.outcomes[str(body.get("decision_id"))] = row
    elif kind == "ack":
        story.acks.append(row)
    elif kind == "event":
        story.events.append(row)
    elif kind == "event.published":
        story.published.update(str(event_id) for event_id in items_of(body, "event_ids"))
    elif kind == "tx.refused":
        story.refused_completion = row
        story.refused_completions += 1
    elif kind.startswith("tx."):
        _sort_tx(story, row, kind)


def _sort_tx(story: Story, row: JournalRow, kind: str) -> None:
    body = row.body
    tx_id = str(body.get("tx_id"))
    attempt = story.attempts.setdefault(tx_id, Attempt(tx_id))
    attempt.epoch = _number(body.get("epoch"), attempt.epoch)
    if kind == "tx.begun":
        attempt.begun, story.refused_completion = row, None
        attempt.completion_key = text_of(body, "completion_key") or ""
        attempt.run_status = text_of(body, "run_status")
        for domain in items_of(body, "domains"):
            if isinstance(domain, Mapping):
                n = _number(domain.get("n"), len(attempt.steps))
                step = Step(n, text_of(domain, "name"), text_of(domain, "class"))
                step.effect_id = text_of(domain, "effect_id")
                attempt.steps.setdefault(n, step)
    elif kind == "tx.step":
        n = _number(body.get("n"), len(attempt.steps))
        attempt.steps[n] = Step(
            n,
            text_of(body, "domain"),
            text_of(body, "class"),
            str(body.get("state")),
            text_of(body, "result_id"),
            text_of(body, "error"),
            text_of(body, "code"),
            row.seq,
        )
    elif kind in _MOVED_TO:
        attempt.state = _MOVED_TO[kind]
        attempt.run_status = text_of(body, "run_status") or attempt.run_status
        if kind == "tx.aborting":
            attempt.aborting = row
        attempt.ended = None if attempt.in_flight else row
    attempt.phase = text_of(body, "phase") or attempt.phase


def text_of(body: Mapping[str, Any], name: str) -> str | None:
    """Return a recorded text, or ``None``; a value of another type, which only forgery leaves, is shown as text."""
    value = body.get(name)
    return value if value is None or isinstance(value, str) else str(value)


def flag_of(body: Mapping[str, Any], name: str) -> bool | None:
    """Return a recorded truth value, or ``None`` when there is none."""
    value = body.get(name)
    return value if isinstance(value, bool) else None


def items_of(body: Mapping[str, Any], name: str) -> list[Any]:
    """Return a recorded list, or an empty one."""
    value = body.get(name)
    return value if isinstance(value, list) else []


def _number(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
