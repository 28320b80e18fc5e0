"""Admission and the one end: how a message enters the spine mailbox and how its sender hears of it."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from spine.kernel.clock import Clock
from spine.kernel.deadlines import Deadlines
from spine.kernel.errors import DeadlineExceeded, MailboxClosed, Overloaded, SpineError, SpineFailed
from spine.kernel.ledger import End, Ledger
from spine.kernel.mailbox import Mailbox
from spine.kernel.messages import Envelope, Lane, ReplySlot, Request
from spine.kernel.tracing import Tracer

T = TypeVar("T")

ROUTER = "router"
END_EVENTS = {
    End.REPLIED: "spine.message.handled",
    End.HANDLED: "spine.message.handled",
    End.FAILED: "spine.message.failed",
    End.EXPIRED: "spine.message.expired",
    End.CANCELLED: "spine.message.cancelled",
    End.DEAD_LETTERED: "spine.message.undelivered",
}
DEAD_LETTERS = 128
# A call in flight sends a few records at a time; each lane holds that many for every admission credit.
RECORDS_A_CALL = 4


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that reached nobody: its number, kind, recipient and why."""

    number: int
    kind: str
    recipient: str
    reason: str


class Exchange:
    """Admits messages to the spine mailbox and ends every one of them exactly once.

    ``credits`` (>= 1) bounds the calls from outside together with the calls they nest; replies, records and control
    messages need none because each admitted call bounds them. ``spare`` is how many more of these there may be at a
    time, of what goes on without a caller. Bound to the event loop it was made on.
    """

    def __init__(self, clock: Clock, tracer: Tracer, *, credits: int = 4096, spare: int = 0) -> None:
        self.clock = clock
        self.tracer = tracer
        self.ledger = Ledger()
        self.deadlines = Deadlines(clock)
        self.loop = asyncio.get_running_loop()
        self.closed: SpineError | None = None
        self.last_seq = 0
        self.dead_letters: collections.deque[DeadLetter] = collections.deque(maxlen=DEAD_LETTERS)
        self.mailboxes: dict[str, Mailbox] = {}
        self._limit = credits
        self._capacity = credits * RECORDS_A_CALL + spare
        self._credits = credits
        self._numbers = 0
        self._idle: asyncio.Future[None] | None = None
        self._now = clock.monotonic
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._spine = self.mailbox(ROUTER)

    def mailbox(self, name: str) -> Mailbox:
        """The mailbox of that actor, made at its first mention."""
        if name not in self.mailboxes:
            self.mailboxes[name] = Mailbox(name, capacity=self._capacity)
        return self.mailboxes[name]

    @property
    def credits_in_use(self) -> int:
        """Admitted calls that have not ended."""
        return self._limit - self._credits

    async def ask(
        self,
        request: Request[T],
        recipient: str,
        *,
        timeout_s: float,
        sender: str = "caller",
        lane: Lane = Lane.INTERNAL,
        parent: Envelope | None = None,
    ) -> T:
        """Send a request through the spine mailbox and wait for its reply, at most ``timeout_s`` seconds.

        Raises what ``post`` raises, ``DeadlineExceeded``, ``ActorCrashed``, or the recipient's own error.
        """
        return cast(
            T,
            await self.answer(
                self.post(request, recipient, timeout_s=timeout_s, sender=sender, lane=lane, parent=parent)
            ),
        )

    async def answer(self, envelope: Envelope) -> Any:
        """Wait for the reply to a posted request; a cancelled caller ends it as cancelled."""
        assert isinstance(envelope.reply_to, asyncio.Future)
        try:
            return await envelope.reply_to
        except asyncio.CancelledError:
            self.cancel(envelope)
            raise

    def post(
        self,
        payload: Any,
        recipient: str,
        *,
        timeout_s: float,
        sender: str = "caller",
        lane: Lane = Lane.INTERNAL,
        parent: Envelope | None = None,
        trace: str = "",
        reply: bool = True,
        reserved: bool = False,
        reply_to: ReplySlot | None = None,
    ) -> Envelope:
        """Admit a message at once and return its envelope.

        A message in the ingress lane takes an admission credit until its end (``reserved`` tells that ``reserve`` has
        taken it), and what its mailbox queue cannot hold is refused at once; with a ``parent`` it has at most the
        time left to the parent. Raises ``Overloaded``, ``MailboxClosed`` or ``SpineFailed`` when it is not admitted.
        """
        ingress = lane is Lane.INGRESS
        if self.closed is not None and ((ingress and parent is None) or isinstance(self.closed, SpineFailed)):
            self.ledger.refused += 1
            raise type(self.closed)(*self.closed.args)
        if ingress and not reserved and self._credits <= 0:
            self.ledger.refused += 1
            raise Overloaded(
                f"the spine mailbox has all {self._limit} admission credits in use: ask again later or with wait=True"
            )
        now = self._now()
        deadline = now + timeout_s
        cause = 0
        if parent is not None:
            cause = parent.number
            trace = parent.trace or self.tracer.trace_id(cause)
            if ingress and parent.deadline < deadline:
                deadline = parent.deadline
        number = self._numbers = self._numbers + 1
        future = reply_to or (self.loop.create_future() if reply else None)
        envelope = Envelope(
            self, number, payload, recipient, sender, lane, deadline, now, future, trace, cause, ingress
        )
        self._spine.put(envelope)
        if ingress and not reserved:
            self._credits -= 1
        self._open(envelope)
        if self.tracer.messages:
            self.tracer.message("spine.message.enqueued", envelope, ROUTER, mailbox_depth=len(self._spine))
        return envelope

    def signal(self, actor: str, payload: Any, *, timeout_s: float, sender: str) -> None:
        """Put a control message straight into an actor's mailbox, as OTP's exit signals go past every queue."""
        now = self._now()
        number = self._numbers = self._numbers + 1
        lane, deadline = Lane.CONTROL, now + timeout_s
        envelope = Envelope(self, number, payload, actor, sender, lane, deadline, now, None, "", 0, False)
        self.mailbox(actor).put(envelope)
        self._open(envelope)

    def _open(self, envelope: Envelope) -> None:
        ledger = self.ledger
        ledger.admitted += 1
        ledger.open[envelope.number] = envelope
        self.deadlines.add(envelope.deadline, envelope)

    async def reserve(self, timeout_s: float) -> None:
        """Take a credit for a ``post(reserved=True)`` that follows at once, waiting in turn at most ``timeout_s``.

        Raises ``Overloaded`` when as many callers wait already as there are credits, or when the time is up.
        """
        if self.closed is not None:
            self.ledger.refused += 1
            raise type(self.closed)(*self.closed.args)
        if self._credits > 0 and not self._waiting:
            self._credits -= 1
            return
        if len(self._waiting) >= self._limit:
            self.ledger.refused += 1
            raise Overloaded(f"{self._limit} callers wait for the spine mailbox already: ask again later")
        turn: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append(turn)
        expiry = self._now() + timeout_s
        waiter = _Turn(turn)
        self.deadlines.add(expiry, waiter)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release()
            raise
        except Overloaded:
            self.ledger.refused += 1
            raise
        finally:
            self.deadlines.discard(expiry, waiter)
            # Who gave up stands in nobody's way.
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)

    def unreserve(self) -> None:
        """Give a reserved credit back: its post was not admitted."""
        self._release()

    def reply(self, envelope: Envelope, value: Any) -> None:
        """Answer an ask."""
        future = envelope.reply_to
        if future is not None and future.cancelled():
            self.cancel(envelope)
        elif self._end(envelope, End.REPLIED) and future is not None:
            future.set_result(value)

    def fail(self, envelope: Envelope, error: BaseException) -> None:
        """Answer an ask with an error."""
        self._end_with(envelope, End.FAILED, error)

    def handled(self, envelope: Envelope) -> None:
        """A tell was handled."""
        self._end(envelope, End.HANDLED)

    def cancel(self, envelope: Envelope) -> None:
        """The caller waits no more: what has not started will not start."""
        if not envelope.done:
            self._end(envelope, End.CANCELLED)
            if envelope.reply_to is not None:
                envelope.reply_to.cancel()

    def expire(self, envelope: Envelope) -> None:
        """The deadline has passed."""
        if not envelope.done:
            where = envelope.holder or f"the mailbox of {envelope.recipient!r}"
            self._end_with(
                envelope,
                End.EXPIRED,
                DeadlineExceeded(
                    f"message {self.tracer.msg_id(envelope.number)} ({type(envelope.payload).__name__}) had no reply "
                    f"within its deadline, it is with {where}: started work goes on and is recorded"
                ),
            )

    def dead_letter(self, envelope: Envelope, error: BaseException) -> None:
        """Nobody can take the envelope."""
        if envelope.done:
            return
        kind = type(envelope.payload).__name__
        self.dead_letters.append(DeadLetter(envelope.number, kind, envelope.recipient, str(error)))
        actor = envelope.holder or envelope.recipient
        self.tracer.fault("spine.message.dead_lettered", exc=error, actor=actor, **self.tracer.identity(envelope))
        if envelope.reply_to is None:
            self._end(envelope, End.DEAD_LETTERED)
        else:
            self._end_with(envelope, End.FAILED, error)

    def on_idle(self, told: asyncio.Future[None] | None) -> None:
        """Tell this future once no admitted call is in flight any more; ``None`` takes that back."""
        self._idle = told
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self._idle is not None and self._credits == self._limit and not self._idle.done():
            self._idle.set_result(None)

    def close(self, error: SpineError) -> None:
        """Admit no more calls; with ``SpineFailed`` nothing at all, and what is in flight fails now."""
        self.closed = error
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(type(error)(*error.args))
        self._waiting.clear()
        if isinstance(error, SpineFailed):
            for envelope in list(self.ledger.open.values()):
                self._end_with(envelope, End.FAILED, type(error)(*error.args))

    def bury(self, mailbox: Mailbox) -> None:
        """Close a mailbox and make dead letters of what it still held."""
        for envelope in mailbox.close():
            self.dead_letter(
                envelope, MailboxClosed(f"the actor {mailbox.name!r} stopped before it took the message: start again")
            )

    def _end_with(self, envelope: Envelope, end: End, error: BaseException) -> None:
        future = envelope.reply_to
        if future is None:
            self.dead_letter(envelope, error)
        elif future is not None and future.cancelled():
            self.cancel(envelope)
        elif self._end(envelope, end, error):
            future.set_exception(error)

    def _end(self, envelope: Envelope, end: End, error: BaseException | None = None) -> bool:
        ledger = self.ledger
        if envelope.done:
            ledger.late_replies += 1
            if self.tracer.messages:
                self.tracer.message("spine.message.late", envelope, envelope.holder or envelope.recipient)
            return False
        envelope.done = True
        del ledger.open[envelope.number]
        ledger.ended[end] += 1
        self.deadlines.discard(envelope.deadline, envelope)
        if self.tracer.messages:
            self._trace_end(envelope, end, error)
        if envelope.credit:
            self._release()
        return True

    def _trace_end(self, envelope: Envelope, end: End, error: BaseException | None) -> None:
        facts: dict[str, Any] = {} if error is None else {"error_type": type(error).__name__, "error": str(error)}
        if envelope.taken:
            facts["handle_ms"] = round((self._now() - envelope.taken) * 1e3, 3)
        self.tracer.message(END_EVENTS[end], envelope, envelope.holder or envelope.recipient, **facts)

    def _release(self) -> None:
        """Hand the credit to the next in turn, or put it back."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._credits += 1
        if self._idle is not None:
            self._tell_idle()


class _Turn:
    """A caller's place in the queue for a credit."""

    __slots__ = ("_turn",)

    def __init__(self, turn: asyncio.Future[None]) -> None:
        self._turn = turn

    def expire(self) -> None:
        if not self._turn.done():
            self._turn.set_exception(
                Overloaded("no admission credit came free within the deadline: ask again later or with more time")
            )
