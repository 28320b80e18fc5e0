"""The runtime audit contract: what a run promised, what was acknowledged, the verdict, and the requests about it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from spine.kernel.errors import SpineError
from spine.kernel.messages import Request

# Domain and action.
Key = tuple[str, str]
START_TRACE: Final = ("logs", "start_trace")
FINALIZE: Final = ("orchestrator", "finalize_run")
# How many promises of its own a run may start with.
EXPECTATIONS_MOST: Final = 200
# What a contract stands at until something but the time left to it decides.
PENDING: Final = "PENDING"
# The journal rows that tell of a run's contract.
CONTRACT_KINDS: Final = ("run.started", "ack", "contract.reconciled")


class ContractError(SpineError):
    """A report or question about a contract that is not taken.

    ``code`` is INVALID_PARAMS, UNKNOWN_RUN or TENANT_MISMATCH.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[type[ContractError], tuple[str, str]]:
        return (type(self), (self.code, self.reason))


class AckStatus(StrEnum):
    """What a domain reported."""

    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    ROLLED_BACK = "ROLLED_BACK"


# What a report says that gives no error.
_COMPLAINT: Final = {AckStatus.FAILED: "failed", AckStatus.ROLLED_BACK: "rolled back"}


class Overall(StrEnum):
    """The verdict over all promises of a run."""

    COMPLETE = "COMPLETE"
    INCOMPLETE = "INCOMPLETE"
    STALE = "STALE"


def moment_of(started_at: int, deadline_s: float) -> int:
    """When a promise of a run started at ``started_at`` must be kept; unix microseconds both."""
    return started_at + round(deadline_s * 1_000_000)


@dataclass(frozen=True, slots=True)
class Expectation:
    """A promise: ``domain`` will acknowledge ``action`` within ``deadline_s`` seconds of the run's start.

    ``after_commit``: that may be after the run is finalised.
    """

    domain: str
    action: str
    deadline_s: float = 3600.0
    after_commit: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The form in which ``run.started`` holds it."""
        later = {"after_commit": True} if self.after_commit else {}
        return {"domain": self.domain, "action": self.action, "deadline_s": self.deadline_s, **later}


class Due(NamedTuple):
    """A promise with its moment (unix microseconds)."""

    domain: str
    action: str
    deadline_at: int
    after_commit: bool = False

    @property
    def key(self) -> Key:
        """What is to be acknowledged, whenever."""
        return self.domain, self.action


class Ack(NamedTuple):
    """What a domain reported, in the order of the journal.

    An action is delivered as long as one SUCCESS of it stands. The last word counts: a later FAILED or ROLLED_BACK with
    the same transaction takes back the result it names, or all of them where it names none, and a SUCCESS after that
    delivers again. Another transaction's word, such as that of an earlier attempt, takes nothing back. A result that
    was ROLLED_BACK by its id stays so, whatever arrives late: what is done anew has a new id.
    """

    domain: str
    action: str
    status: AckStatus
    result_id: str | None = None
    error: str | None = None
    tx_id: str | None = None

    @property
    def key(self) -> Key:
        """What is acknowledged, by whichever report."""
        return self.domain, self.action


STANDARD: Final = (
    Expectation(*START_TRACE, 60.0),
    Expectation("incidents", "create_incident"),
    Expectation("policies", "evaluate_policy"),
    Expectation(*FINALIZE),
)


def promised(taking_part: Iterable[Expectation] = (), declared: Iterable[Expectation] = ()) -> tuple[Expectation, ...]:
    """What a run promises at its start: the standard set, that of each domain taking part, and the user's own.

    A later declaration of the same domain and action replaces the earlier one's deadline.
    """
    found = {(e.domain, e.action): e for e in STANDARD}
    for expectation in taking_part:
        found.setdefault((expectation.domain, expectation.action), expectation)
    for expectation in declared:
        found[expectation.domain, expectation.action] = expectation
    return tuple(found.values())


def first_due(expectations: Iterable[Expectation], started_at: int) -> int | None:
    """When the verdict over a run that has just started, its trace with it, first changes by itself, if ever."""
    waiting = (e.deadline_s for e in expectations if (e.domain, e.action) != START_TRACE)
    soonest = min(waiting, default=None)
    return None if soonest is None else moment_of(started_at, soonest)


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise or report that is not as it should be."""

    domain: str
    action: str
    verdict: str
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"domain": self.domain, "action": self.action, "verdict": self.verdict, "error": self.error}

    def __str__(self) -> str:
        """For messages: ``billing/charge failed: card declined``."""
        return f"{self.domain}/{self.action} {self.verdict}" + (f": {self.error}" if self.error else "")


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The verdict over a run's contract.

    ``missing``: promised, and never acknowledged although the time is over or the run is finalised. ``failed``:
    acknowledged, but FAILED or rolled back. ``drift``: acknowledged, but never promised. ``stale``: the run was not
    finalised in time. ``pending``: there is still time. Without a new word all this holds until ``due_at`` (unix
    microseconds), for ever where that is ``None``.
    """

    overall: Overall
    missing: tuple[Finding, ...] = ()
    drift: tuple[Finding, ...] = ()
    failed: tuple[Finding, ...] = ()
    stale: tuple[Finding, ...] = ()
    pending: tuple[Finding, ...] = ()
    due_at: int | None = None

    @property
    def standing(self) -> str:
        """The verdict as the journal keeps it: PENDING as long as nothing is found but what still has time."""
        found = self.missing or self.failed or self.stale
        return PENDING if self.pending and not found else self.overall.value

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "overall": self.overall.value,
            "missing": [f.to_dict() for f in self.missing],
            "drift": [f.to_dict() for f in self.drift],
            "failed": [f.to_dict() for f in self.failed],
            "stale": [f.to_dict() for f in self.stale],
            "pending": [f.to_dict() for f in self.pending],
        }


def _listen(acks: Iterable[Ack]) -> tuple[set[Key], dict[Key, str | None]]:
    """What stands delivered, by the rule of ``Ack``; and of everything that was reported, the last complaint."""
    standing: dict[tuple[str, str, str | None], set[str | None]] = {}
    undone: set[tuple[str, str, str | None, str]] = set()
    heard: dict[Key, str | None] = {}
    for domain, action, status, result_id, error, tx_id in acks:
        results = standing.setdefault((domain, action, tx_id), set())
        if status is AckStatus.SUCCESS:
            heard.setdefault((domain, action), None)
            if result_id is None or (domain, action, tx_id, result_id) not in undone:
                results.add(result_id)
            continue
        heard[domain, action] = error or _COMPLAINT[status]
        if result_id is None:
            results.clear()
            continue
        results.discard(result_id)
        if status is AckStatus.ROLLED_BACK:
            undone.add((domain, action, tx_id, result_id))
    return {(domain, action) for (domain, action, _), results in standing.items() if results}, heard


def reconcile(expectations: Sequence[Due], acks: Sequence[Ack], now_us: int) -> Reconciliation:
    """Compare what was promised with what was acknowledged, as of ``now_us`` (unix microseconds).

    ``acks`` are in the order in which they were recorded: by the rule of ``Ack`` the last word counts.
    """
    delivered, heard = _listen(acks)
    finalised = FINALIZE in delivered
    missing: list[Finding] = []
    failed: list[Finding] = []
    stale: list[Finding] = []
    pending: list[Finding] = []
    moments: list[int] = []
    for due in expectations:
        key = due.key
        if key in delivered:
            continue
        late = now_us > due.deadline_at
        over = finalised and not due.after_commit
        if not late and not over and (key not in heard or key == FINALIZE):
            # A failed finalize_run turns stale when its time is over; whatever else failed stays failed.
            moments.append(due.deadline_at)
        if key == FINALIZE and late:
            stale.append(Finding(*key, "stale", heard.get(key)))
        elif key in heard:
            failed.append(Finding(*key, "failed", heard[key]))
        elif late or over:
            missing.append(Finding(*key, "missing"))
        else:
            pending.append(Finding(*key, "pending"))
    known = {due.key for due in expectations}
    drift = tuple(Finding(*key, "drift", error) for key, error in heard.items() if key not in known)
    if stale:
        overall = Overall.STALE
    elif missing or failed or pending:
        overall = Overall.INCOMPLETE
    else:
        overall = Overall.COMPLETE
    return Reconciliation(
        overall, tuple(missing), drift, tuple(failed), tuple(stale), tuple(pending), min(moments, default=None)
    )


def unmet(expectations: Iterable[Due], acks: Iterable[Ack], taking_part: Collection[Key] = ()) -> tuple[Finding, ...]:
    """What a run that blocks on its contract still lacks, whatever time is left.

    Not asked for are finalize_run and ``taking_part``, the (domain, action) that the completion itself acknowledges.
    """
    delivered, heard = _listen(acks)
    lacking = [due.key for due in expectations if due.key not in delivered]
    return tuple(
        Finding(*key, "failed", heard[key]) if key in heard else Finding(*key, "missing")
        for key in lacking
        if key != FINALIZE and key not in taking_part
    )


@dataclass(slots=True)
class ReconcileRun(Request[Reconciliation]):
    """Judge a run's contract now; what changed is recorded."""

    run_id: str


@dataclass(slots=True)
class Acknowledge(Request[None]):
    """A domain's own report; ``status`` is one of ``AckStatus``."""

    run_id: str
    tenant_id: str
    domain: str
    action: str
    status: str = AckStatus.SUCCESS.value
    result_id: str | None = None
    error: str | None = None
