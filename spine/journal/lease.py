"""The lease: the row by which a process says that it lives, so that nobody takes over what it is at work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from spine.journal.processes import lives, this_process
from spine.journal.session import Session

RELEASED: Final = 0
_RENEW: Final = (
    "INSERT INTO instances (instance, lease_until_at, started_at, process) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (instance) DO UPDATE SET lease_until_at = excluded.lease_until_at"
)
_FORGET: Final = (
    "DELETE FROM instances WHERE lease_until_at < ? AND instance NOT IN (SELECT instance FROM open_decisions)"
)
_FORGET_AFTER_US: Final = 24 * 3600 * 1_000_000


@dataclass(slots=True)
class Lease:
    """The lease of ``instance``, ``length_us`` long each time it is renewed; ``abandoned`` tells that nobody needs it.

    Times are unix microseconds of the clock ``now_us``.
    """

    instance: str
    length_us: int
    now_us: Callable[[], int]
    abandoned: Callable[[], bool]
    until_us: int = RELEASED

    @property
    def due(self) -> bool:
        """Whether a third of it is over."""
        return self.now_us() >= self.until_us - self.length_us * 2 // 3

    def renew(self, session: Session) -> None:
        """Write that the instance lives."""
        self._write(session, self.now_us() + self.length_us)

    def release(self, session: Session) -> None:
        """Write that it lives no more."""
        self._write(session, RELEASED)

    def _write(self, session: Session, until_us: int) -> None:
        now_us = self.now_us()
        session.begin()
        session.execute(_RENEW, (self.instance, until_us, now_us, this_process() or None))
        session.execute(_FORGET, (now_us - _FORGET_AFTER_US,))
        session.commit()
        self.until_us = until_us


def alive(until_us: int | None, process: str | None, now_us: int) -> bool:
    """Whether the holder of a lease lives.

    A process of this machine may be held up for longer than its lease and lives all the same: who gave no lease back is
    looked for. Of other machines the lease alone tells.
    """
    if not until_us:
        return False
    known = lives(process)
    return until_us >= now_us if known is None else known


def holds(until_us: int | None, process: str | None, now_us: int) -> bool:
    """Whether the holder of a lease may still go on with what a fencing token keeps anybody else from.

    Being held up for longer than the lease loses it: what was taken over meanwhile is fenced.
    """
    return bool(until_us) and (until_us or 0) >= now_us and lives(process) is not False
