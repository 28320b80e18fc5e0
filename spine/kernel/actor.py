"""The actor loop: take, skip what is over, handle; no actor awaits a reply in it."""

from __future__ import annotations

from collections.abc import Sequence

from spine.kernel.errors import ActorCrashed
from spine.kernel.exchange import Exchange
from spine.kernel.messages import Envelope, Lane, Stop

# After so many messages the loop lets others run, however full the mailbox is.
BATCH = 256
_CONTROL = Lane.CONTROL


class Actor:
    """One of the deciders: a synchronous ``receive`` and whatever state it keeps between messages.

    Work that waits continues in a task the actor owns. An exception out of ``receive`` crashes this incarnation; the
    supervisor makes the next one, which finds the same mailbox.
    """

    name: str

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.mailbox = exchange.mailbox(self.name)

    async def start(self) -> None:
        """Read the state again; the actor is ready when this returns."""

    async def resume(self, taken: Sequence[Envelope], crash: ActorCrashed | None) -> None:
        """Answer what the crashed incarnation had taken: by default with the crash."""
        for envelope in taken:
            if crash is not None:
                envelope.fail(
                    ActorCrashed(
                        crash.actor, str(self.exchange.tracer.msg_id(envelope.number)), crash.restart, crash.detail
                    )
                )

    async def stop(self) -> bool:
        """Give back what the incarnation holds, after its loop, however that ended; ``False`` when some of it stays."""
        return True

    def receive(self, envelope: Envelope) -> None:
        """Handle one message without waiting for anything."""
        raise TypeError(f"actor {self.name!r} does not say how it receives {type(envelope.payload).__name__}")

    async def run(self) -> None:
        """Handle messages until a ``Stop`` comes through the control lane."""
        exchange, mailbox = self.exchange, self.mailbox
        take, receive, now, tracer = mailbox.take, self.receive, exchange.clock.monotonic, exchange.tracer
        name = self.name
        while True:
            for _ in range(BATCH):
                envelope = take()
                if envelope is None:
                    break
                if envelope.done:
                    continue
                envelope.holder = name
                if envelope.lane is _CONTROL and type(envelope.payload) is Stop and envelope.recipient == name:
                    exchange.handled(envelope)
                    return
                moment = now()
                if envelope.deadline <= moment:
                    exchange.expire(envelope)
                    continue
                if tracer.messages:
                    self.traced(envelope, moment)
                receive(envelope)
                if envelope.reply_to is None and envelope.holder is name and not envelope.done:
                    exchange.handled(envelope)
            else:
                mailbox.ring()
            await mailbox.wait()

    def task_crashed(self, name: str, error: BaseException) -> None:
        """Tell of a task of this actor's that ended with an exception."""
        self.exchange.tracer.fault("spine.task.crashed", exc=error, actor=self.name, task=name)

    def traced(self, envelope: Envelope, moment: float) -> None:
        """Log that the actor takes the envelope."""
        envelope.taken = moment
        queue_ms = round((moment - envelope.enqueued) * 1e3, 3)
        self.exchange.tracer.message(
            "spine.message.received", envelope, self.name, mailbox_depth=len(self.mailbox), queue_ms=queue_ms
        )
