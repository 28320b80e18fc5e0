"""The spine mailbox: the one way in, and the router that stamps what comes through it and forwards it."""

from __future__ import annotations

from collections.abc import Mapping

from spine.kernel.actor import Actor
from spine.kernel.errors import ConfigurationError, MailboxClosed, Overloaded
from spine.kernel.exchange import ROUTER, Exchange
from spine.kernel.mailbox import Mailbox
from spine.kernel.messages import Envelope


class Router(Actor):
    """Gives every message its place in the one order, then hands it to its recipient's mailbox."""

    name = ROUTER

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange)
        self._mailboxes: Mapping[str, Mailbox] = exchange.mailboxes

    def traced(self, envelope: Envelope, moment: float) -> None:
        """Said after the stamp instead, so that the event carries its seq."""

    def receive(self, envelope: Envelope) -> None:
        """Stamp and forward; what cannot be delivered becomes a dead letter."""
        exchange = self.exchange
        envelope.seq = exchange.last_seq = exchange.last_seq + 1
        if exchange.tracer.messages:
            super().traced(envelope, exchange.clock.monotonic())
        mailbox = self._mailboxes.get(envelope.recipient)
        if mailbox is None or envelope.recipient == ROUTER:
            exchange.dead_letter(
                envelope,
                ConfigurationError(
                    f"message {type(envelope.payload).__name__} names the recipient {envelope.recipient!r}, "
                    f"which is not an actor: use one of {sorted(set(self._mailboxes) - {ROUTER})}"
                ),
            )
            return
        envelope.holder = None
        try:
            mailbox.put(envelope)
        except (MailboxClosed, Overloaded) as error:
            exchange.dead_letter(envelope, error)
