"""What travels: requests that type their reply, and the envelope around each message.

A message is a slotted dataclass that nobody changes after sending it. Identity (trace, correlation, causation) travels
in the envelope, never in ambient context.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from spine.kernel.exchange import Exchange

R_co = TypeVar("R_co", covariant=True)


class ReplySlot(Protocol):
    """Where a reply goes: a future, or whatever a caller that does not await puts in its place."""

    def cancelled(self) -> bool: ...

    def cancel(self) -> object: ...

    def set_result(self, value: Any, /) -> None: ...

    def set_exception(self, error: Any, /) -> None: ...


class Reply:
    """A reply slot that tells a callback at once, for callers that do not await; stands where a future would."""

    __slots__ = ("_cancelled", "_tell")

    def __init__(self, tell: Callable[[Any, BaseException | None], None]) -> None:
        self._tell = tell
        self._cancelled = False

    def cancelled(self) -> bool:
        """Whether the caller waits no more."""
        return self._cancelled

    def cancel(self) -> None:
        """Tell the caller that its request was cancelled."""
        if not self._cancelled:
            self._cancelled = True
            self._tell(None, CancelledError())

    def set_result(self, value: Any) -> None:
        """Tell the answer."""
        self._tell(value, None)

    def set_exception(self, error: BaseException) -> None:
        """Tell the error."""
        self._tell(None, error)


class Request(Generic[R_co]):
    """Base of every message that is asked: ``ask(Request[R])`` gives ``R``."""

    __slots__ = ()


class Stop:
    """The control message that ends an actor's loop after what it holds."""

    __slots__ = ()


class Lane(IntEnum):
    """The order in which a mailbox is drained."""

    CONTROL = 0
    INTERNAL = 1
    INGRESS = 2


class Envelope:
    """One message on its way: who, to whom, in answer to what, until when, and where the reply goes.

    ``number`` identifies it within its exchange (``Exchange.msg_id`` renders it), ``seq`` is the order in which the
    router stamped it, ``deadline`` and ``enqueued`` are monotonic seconds, ``holder`` names the actor that has taken
    it, ``taken`` when (set while messages are traced), and ``done`` tells that it has had its one end.
    """

    __slots__ = (
        "causation",
        "credit",
        "deadline",
        "done",
        "enqueued",
        "exchange",
        "holder",
        "lane",
        "number",
        "payload",
        "recipient",
        "reply_to",
        "sender",
        "seq",
        "taken",
        "trace",
    )

    def __init__(
        self,
        exchange: Exchange,
        number: int,
        payload: Any,
        recipient: str,
        sender: str,
        lane: Lane,
        deadline: float,
        enqueued: float,
        reply_to: ReplySlot | None,
        trace: str,
        causation: int,
        credit: bool,
    ) -> None:
        self.exchange = exchange
        self.number = number
        self.payload = payload
        self.recipient = recipient
        self.sender = sender
        self.lane = lane
        self.deadline = deadline
        self.enqueued = enqueued
        self.reply_to = reply_to
        self.trace = trace
        self.causation = causation
        self.credit = credit
        self.seq = 0
        self.taken = 0.0
        self.holder: str | None = None
        self.done = False

    def expire(self) -> None:
        """The deadline has passed."""
        self.exchange.expire(self)

    def reply(self, value: Any) -> None:
        """Answer the ask; a late answer is counted and named, and changes nothing."""
        self.exchange.reply(self, value)

    def fail(self, error: BaseException) -> None:
        """Answer the ask with an error."""
        self.exchange.fail(self, error)

    @property
    def correlation_id(self) -> str | None:
        """The run the message belongs to."""
        return getattr(self.payload, "run_id", None)
