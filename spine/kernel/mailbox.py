"""The bounded queue in front of an actor: three lanes, one doorbell, a ring of what went in last.

Lanes are anyio memory streams that are only ever drained with ``receive_nowait``; the actor waits on the doorbell
alone. A task cancelled while it waits on a stream can lose the item it was handed; a lost doorbell loses nothing.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass

import anyio

from spine.kernel.errors import MailboxClosed, Overloaded
from spine.kernel.messages import Envelope, Lane

RING = 64


@dataclass(frozen=True, slots=True)
class Passage:
    """An envelope as the black box remembers it: no payload, so nothing secret and nothing kept alive."""

    number: int
    kind: str
    sender: str
    lane: str
    enqueued: float


class Mailbox:
    """A queue of at most ``capacity`` envelopes a lane; it outlives the actor's incarnations."""

    def __init__(self, name: str, *, capacity: int) -> None:
        self.name = name
        self.closed = False
        self.depth = [0, 0, 0]
        self._capacity = capacity
        lanes = [anyio.create_memory_object_stream[Envelope](capacity) for _ in Lane]
        self._put = [send.send_nowait for send, _ in lanes]
        self._take = [receive.receive_nowait for _, receive in lanes]
        self._ring_bell, self._bell = anyio.create_memory_object_stream[None](1)
        self._streams = [end for pair in lanes for end in pair]
        self._rung = False
        self._ring: deque[tuple[int, type, str, Lane, float]] = deque(maxlen=RING)

    def put(self, envelope: Envelope) -> None:
        """Queue the envelope at once.

        Raises ``MailboxClosed`` after ``close`` and ``Overloaded`` when its lane is full; then nothing has changed.
        """
        lane = envelope.lane
        if self.closed:
            raise MailboxClosed(f"mailbox {self.name!r} is closed: the Spine is stopping, send nothing more")
        try:
            self._put[lane](envelope)
        except anyio.WouldBlock:
            raise Overloaded(
                f"mailbox {self.name!r} holds {self._capacity} messages in lane {lane.name}: ask again later"
            ) from None
        self.depth[lane] += 1
        self._ring.append((envelope.number, type(envelope.payload), envelope.sender, lane, envelope.enqueued))
        if not self._rung:
            self.ring()

    def take(self) -> Envelope | None:
        """The next envelope in lane order, or ``None``."""
        depth = self.depth
        for lane in (0, 1, 2):
            if depth[lane]:
                depth[lane] -= 1
                return self._take[lane]()
        return None

    def ring(self) -> None:
        """Wake the actor that waits."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(anyio.WouldBlock):
                self._ring_bell.send_nowait(None)

    async def wait(self) -> None:
        """Return when something may be here."""
        try:
            await self._bell.receive()
        finally:
            self._rung = False

    def passages(self) -> list[Passage]:
        """The last envelopes that were put in, oldest first, without payloads."""
        return [Passage(n, kind.__name__, sender, lane.name, at) for n, kind, sender, lane, at in self._ring]

    def close(self) -> list[Envelope]:
        """Close to new envelopes and return what was still queued."""
        self.closed = True
        rest = []
        while (envelope := self.take()) is not None:
            rest.append(envelope)
        for stream in (*self._streams, self._ring_bell, self._bell):
            stream.close()
        return rest

    def __len__(self) -> int:
        return sum(self.depth)
