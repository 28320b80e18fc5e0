"""What tests of several Spines on one database share: their domains, a clock that is late, and who wrote what."""

from __future__ import annotations

from spine.kernel.clock import VirtualClock
from tests.governed import clock, journal
from tests.participants import Behaviour, Remote, World, well


def pair(world: World, ship: Behaviour = well, *, undo: Behaviour = well, attempts: int = 3) -> list[Remote]:
    """A payment, and a parcel after it."""
    return [
        Remote(world, "pay", rollback=undo, attempts=attempts),
        Remote(world, "ship", after=["pay"], forward=ship, attempts=attempts),
    ]


def epochs(url: str) -> dict[str, list[int]]:
    """The fencing tokens under which each transaction's records were written, in journal order."""
    found: dict[str, list[int]] = {}
    for body in journal(url):
        if body["kind"].startswith("tx.") and body["kind"] != "tx.refused":
            found.setdefault(body["tx_id"], []).append(body["epoch"])
    return found


def late(minutes: float = 10) -> VirtualClock:
    """The clock of a Spine whose lease was over long ago, as everybody else sees it."""
    return clock(ahead_s=-60 * minutes)
