"""The named moments before and after every durable move, call and publication, where a test may make it fail."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from spine.governance.transactions import STEP_MOVES, TX_MOVES

BEGIN: Final = "tx.begin"
CLAIM: Final = "tx.claim"
PUBLISH: Final = "event.publish"
PUBLISHED: Final = "event.published"
CALLS: Final = ("forward", "rollback", "status", "post")

Failpoint = Callable[[str], Awaitable[None]]
"""What is told the name of every moment that is passed; it may raise, wait, or end the process."""


def of_tx(move: str) -> str:
    """The failpoint around a transaction's move."""
    return f"tx.{move}"


def of_step(move: str) -> str:
    """The failpoint around a step's move."""
    return f"step.{move}"


def of_call(method: str) -> str:
    """The failpoint around a call of a domain's method."""
    return f"call.{method}"


MOMENTS: Final = (
    BEGIN,
    CLAIM,
    *(of_tx(move.name) for move in TX_MOVES),
    *(of_step(move.name) for move in STEP_MOVES),
    *(of_call(method) for method in CALLS),
    PUBLISH,
    PUBLISHED,
)
FAILPOINTS: Final = tuple(f"{moment}.{when}" for moment in MOMENTS for when in ("before", "after"))


async def pass_by(_name: str) -> None:
    """Do nothing: what stands at the failpoints unless a test puts something there."""
