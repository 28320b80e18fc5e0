"""What an embedding program may tune; the defaults suit a service."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from spine.effects import ATTEMPTS_MOST
from spine.governance.failpoints import Failpoint, pass_by
from spine.kernel.clock import Clock, SystemClock
from spine.kernel.errors import ConfigurationError
from spine.kernel.supervisor import Policy
from spine.kernel.tracing import Level

DEFAULT_URL = "sqlite+aiosqlite:///spine.db"
PAUSE_MOST_S = 3600.0
WAIT_MOST_S = 86_400.0
CREDITS_MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Retry:
    """How a call to a domain outside is repeated: ``attempts`` times in all (a rollback; then it is parked), waiting
    ``first_s`` seconds and twice as long each time, at most ``most_s``. At most 100 attempts and an hour's pauses.
    """

    attempts: int = 5
    first_s: float = 0.1
    most_s: float = 10.0

    def __post_init__(self) -> None:
        _check_count("retry: attempts", self.attempts, ATTEMPTS_MOST)
        for name in ("first_s", "most_s"):
            _check_seconds(f"retry: {name}", getattr(self, name), PAUSE_MOST_S)


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and ports of one Spine.

    ``credits`` calls are admitted at a time (1 to a million). Stopping drains for ``drain_s`` seconds and ends within
    ``stop_s``; a loop that stands still longer than ``blocked_s`` seconds is reported; none is more than a day.
    ``clock`` and ``seed`` make a Spine repeatable; ``trace`` is the level of the message log, ``None`` for SPINE_TRACE
    or ``off``. ``retry`` is for the calls to domains outside; ``failpoint`` hears of every moment in
    ``spine.governance.failpoints``, for tests.
    """

    credits: int = 4096
    drain_s: float = 10.0
    stop_s: float = 25.0
    blocked_s: float = 0.5
    trace: Level | None = None
    clock: Clock = field(default_factory=SystemClock)
    seed: int | None = None
    supervision: Policy = field(default_factory=Policy)
    retry: Retry = field(default_factory=Retry)
    failpoint: Failpoint = pass_by

    def __post_init__(self) -> None:
        _check_count("settings: credits", self.credits, CREDITS_MOST)
        for name in ("drain_s", "stop_s", "blocked_s"):
            _check_seconds(f"settings: {name}", getattr(self, name), WAIT_MOST_S, more=True)


def _check_count(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ConfigurationError(f"{name} {value!r} must be an integer from 1 to {most}")


def _check_seconds(name: str, value: object, most: float, *, more: bool = False) -> None:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not 0 <= value <= most
        or (more and value == 0)
    ):
        start = "of more than 0 and at most" if more else "from 0 to"
        raise ConfigurationError(f"{name} {value!r} must be a number of seconds {start} {most:g}")


def default_url() -> str:
    """The database when none is named: SPINE_DATABASE_URL, else ./spine.db."""
    return os.environ.get("SPINE_DATABASE_URL") or DEFAULT_URL
