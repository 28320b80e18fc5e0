"""What completions with domains outside must come to, in a few lines: no journal, no time, no second thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ORDER = ("pay", "points", "ship")
UNDER = {"ship": "pay"}
# How a domain may be asked to behave, where that leaves its step, and whether its effect stands then.
FORWARD = {
    "well": ("DONE", True),
    "fails once": ("DONE", True),
    "loses one reply": ("DONE", True),
    "refuses": ("REFUSED", False),
    "refuses late": ("REFUSED", True),
    "fails": ("UNKNOWN", False),
    "loses every reply": ("UNKNOWN", True),
    "hangs": ("UNKNOWN", False),
    "answers nonsense": ("UNKNOWN", True),
    "is stopped": ("UNKNOWN", True),
}
ROLLBACK = {
    "well": ("ROLLED_BACK", False),
    "fails once": ("ROLLED_BACK", False),
    "fails": ("PARKED", True),
    "hangs": ("PARKED", True),
    "loses every reply": ("PARKED", False),
}


@dataclass
class Attempt:
    run: str
    key: str
    status: str
    state: str = "EXECUTING"
    steps: dict[str, str] = field(default_factory=lambda: dict.fromkeys(ORDER, "PLANNED"))
    live: set[str] = field(default_factory=set)
    acks: list[tuple[str, str]] = field(default_factory=list)


class Reference:
    """Every attempt in its order."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []

    def latest(self, run: str) -> dict[str, Attempt]:
        by_key = {attempt.key: attempt for attempt in self.attempts if attempt.run == run}
        return {attempt.key: attempt for attempt in self.attempts if by_key.get(attempt.key) is attempt}

    def complete(self, run: str, key: str, status: str, does: Mapping[str, str], undoes: Mapping[str, str]) -> str:
        prior = self.latest(run).get(key)
        if prior is not None and prior.state in ("COMMITTED", "PARKED"):
            return "CONFLICT" if prior.state == "COMMITTED" and prior.status != status else prior.state
        attempt = Attempt(run, key, status)
        self.attempts.append(attempt)
        for name in ORDER:
            attempt.steps[name], stands = FORWARD[does[name]]
            attempt.live |= {name} if stands else set()
            attempt.acks.append((name, "SUCCESS" if attempt.steps[name] == "DONE" else "FAILED"))
            if attempt.steps[name] != "DONE":
                return self.undo(attempt, undoes)
        if does["book"] != "well":
            return self.undo(attempt, undoes)
        attempt.state = "COMMITTED"
        attempt.acks.append(("orchestrator", "SUCCESS"))
        return attempt.state

    def undo(self, attempt: Attempt, undoes: Mapping[str, str]) -> str:
        kept: set[str | None] = set()
        for name in reversed(ORDER):
            if name in kept or attempt.steps[name] in ("PLANNED", "ROLLED_BACK"):
                continue
            attempt.steps[name], stands = ROLLBACK[undoes[name]]
            attempt.live -= set() if stands else {name}
            if attempt.steps[name] == "PARKED":
                kept.add(UNDER.get(name))
            else:
                attempt.acks.append((name, "ROLLED_BACK"))
        attempt.state = "PARKED" if "PARKED" in attempt.steps.values() else "ABORTED"
        attempt.acks.append(("orchestrator", "FAILED"))
        return attempt.state

    def resolve(self, attempt: Attempt) -> None:
        attempt.state = "ABORTED_MANUAL"
        left = [name for name in ORDER if attempt.steps[name] not in ("PLANNED", "ROLLED_BACK")]
        attempt.acks += [(name, "ROLLED_BACK") for name in left]

    def verdict(self, run: str) -> str | None:
        latest = list(self.latest(run).values())
        states = {attempt.state for attempt in latest}
        if not latest:
            return None
        if states != {"COMMITTED"}:
            return "parked" if "PARKED" in states else "rolled_back"
        return "succeeded" if latest[-1].status == "succeeded" else "failed"
