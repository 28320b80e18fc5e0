"""Where events go after the commit: the publisher protocol, and the default that logs them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import structlog

# How the outbox names what a POST domain is to do; its name follows.
POST: Final = "post:"


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a committed transaction; ``event_id`` is the same at every delivery: receivers drop repeats by it.

    ``instance`` is the Spine that committed it, and that delivers it as long as it lives, ``epoch`` its fencing token.
    """

    event_id: str
    tx_id: str
    run_id: str
    tenant_id: str
    n: int
    type: str
    payload: Mapping[str, Any]
    instance: str = ""
    epoch: int = 1


@runtime_checkable
class Publisher(Protocol):
    """Delivers an event; returning means delivered, raising means it is tried again later."""

    async def publish(self, event: Event) -> None:
        """Deliver one event; called at least once for each, in order within a run."""
        ...


class LogPublisher:
    """Writes every event to the log as ``spine.event``."""

    async def publish(self, event: Event) -> None:
        """Log the event."""
        structlog.stdlib.get_logger("spine").info(
            "spine.event",
            event_id=event.event_id,
            type=event.type,
            run_id=event.run_id,
            tenant_id=event.tenant_id,
            tx_id=event.tx_id,
        )


def publisher_of(given: Publisher | None) -> Publisher:
    """The publisher that was given, else the one that logs. Raises TypeError for what cannot publish."""
    if given is None:
        return LogPublisher()
    if isinstance(given, type) or not inspect.iscoroutinefunction(getattr(given, "publish", None)):
        raise TypeError(
            f"publisher {given!r} must be an object with async publish(event): see spine.publisher.Publisher"
        )
    return given
