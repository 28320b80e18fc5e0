"""The message flow as structlog events with static names; free when off.

Levels: ``off`` (crashes and faults alone), ``decisions`` (decisions and transaction phases as well), ``messages``
(every hop as well). The library never configures structlog: the application does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import structlog

from spine.kernel.errors import ConfigurationError, message_of

if TYPE_CHECKING:
    from spine.kernel.messages import Envelope

Level = Literal["off", "decisions", "messages"]
LEVELS: tuple[Level, ...] = get_args(Level)


class Tracer:
    """Where every part of Spine writes its log events.

    ``messages`` and ``decisions`` are plain flags, so that a hop pays one attribute read when they are off.
    """

    def __init__(self, boot: str, level: Level = "off") -> None:
        self._boot = boot
        self._log = structlog.stdlib.get_logger("spine")
        self.level = level
        self.lost = 0

    @property
    def level(self) -> Level:
        """What is written now."""
        return self._level

    @level.setter
    def level(self, level: Level) -> None:
        if level not in LEVELS:
            raise ConfigurationError(f"trace level {level!r} is unknown: use one of {', '.join(LEVELS)}")
        self._level = level
        self.decisions = level != "off"
        self.messages = level == "messages"

    def msg_id(self, number: int) -> str | None:
        """The message number as it is written: unique across processes and restarts."""
        return f"{self._boot}-{number}" if number else None

    def identity(self, envelope: Envelope) -> dict[str, Any]:
        """What names the envelope in every event."""
        return {
            "trace_id": envelope.trace or self.trace_id(envelope.number),
            "msg_id": self.msg_id(envelope.number),
            "correlation_id": envelope.correlation_id,
            "causation_id": self.msg_id(envelope.causation),
            "run_id": envelope.correlation_id,
            "seq": envelope.seq or None,
            "sender": envelope.sender,
            "message": type(envelope.payload).__name__,
        }

    def trace_id(self, number: int) -> str:
        """The W3C trace id of the tree of messages that began with this number."""
        return f"{self._boot}{number:016x}"

    def message(self, event: str, envelope: Envelope, actor: str, **facts: Any) -> None:
        """One ``spine.message.*`` event; call it only when ``messages`` is set or the event tells of a fault."""
        self._write(self._log.info, event, {"actor": actor, **self.identity(envelope), **facts})

    def decision(self, event: str, **facts: Any) -> None:
        """One decision or transaction phase; call it only when ``decisions`` is set."""
        self._write(self._log.info, event, facts)

    def life(self, event: str, **facts: Any) -> None:
        """An actor starts, restarts or stops."""
        if self.decisions:
            self._write(self._log.info, event, facts)

    def fault(self, event: str, *, exc: BaseException | None = None, **facts: Any) -> None:
        """Something went wrong; written at every level."""
        if exc is not None:
            facts.update(error_type=type(exc).__name__, error=message_of(exc))
        self._write(self._log.error, event, facts)

    def _write(self, log: Callable[..., Any], event: str, facts: dict[str, Any]) -> None:
        try:
            log(event, **facts)
        except (OSError, ValueError):
            # A log that cannot be written (a closed pipe, a full disk) must not crash an actor: health counts it.
            self.lost += 1
