"""Concurrency limits: a call of an operation takes a slot or waits for one in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from actors.calls import Call
from spine.governance.operations import Operation
from spine.kernel.deadlines import Deadlines

# A longer queue is looked through for callers that gave up.
PLACES_MOST = 64


class Slots:
    """The slots of every operation.

    ``on_timeout`` gets the call whose deadline passed while it waited, ``on_gone`` the one whose caller left meanwhile.
    """

    def __init__(
        self,
        operations: Mapping[str, Operation],
        deadlines: Deadlines,
        on_timeout: Callable[[Call], None],
        on_gone: Callable[[Call], None],
    ) -> None:
        self._free = {name: operation.concurrency for name, operation in operations.items()}
        self._waiting: dict[str, deque[_Place]] = {}
        self._deadlines = deadlines
        self._on_timeout = on_timeout
        self._on_gone = on_gone

    def take(self, call: Call) -> bool:
        """Take a slot if one is free."""
        free = self._free[call.name]
        if free > 0:
            self._free[call.name] = free - 1
            call.slotted = True
            return True
        return False

    def wait(self, call: Call) -> None:
        """Queue for a slot until the call's deadline."""
        place = _Place(self, call)
        waiting = self._waiting.get(call.name)
        if waiting is not None and len(waiting) >= PLACES_MOST:
            # Those who gave up hold no admission credit any more: without this the queue would have no bound.
            self._waiting[call.name] = deque(place for place in waiting if not self._left(place))
        self._waiting.setdefault(call.name, deque()).append(place)
        self._deadlines.add(call.deadline, place)

    def give(self, call: Call) -> Call | None:
        """Give the call's slot back, or on to the call returned."""
        if not call.slotted:
            return None
        call.slotted = False
        waiting = self._waiting.get(call.name)
        while waiting:
            place = waiting.popleft()
            self._deadlines.discard(place.call.deadline, place)
            if not self._left(place):
                place.left = True
                place.call.slotted = True
                return place.call
        self._free[call.name] += 1
        return None

    def _left(self, place: _Place) -> bool:
        """Whether nobody waits at this place any more; who left is told of."""
        if not place.left and place.call.envelope.done:
            place.left = True
            self._deadlines.discard(place.call.deadline, place)
            self._on_gone(place.call)
        return place.left

    def empty(self) -> list[Call]:
        """Take every waiting call out of the queues."""
        calls = []
        for waiting in self._waiting.values():
            for place in waiting:
                self._deadlines.discard(place.call.deadline, place)
                if not place.left:
                    place.left = True
                    calls.append(place.call)
            waiting.clear()
        return calls

    def in_use(self, operation: Operation) -> int:
        """Slots of the operation that are taken."""
        return operation.concurrency - self._free[operation.name]

    def waiting(self, name: str) -> int:
        """Calls that wait for a slot of the operation."""
        return sum(not place.left for place in self._waiting.get(name, ()))

    def timed_out(self, call: Call) -> None:
        """Called by a place whose deadline passed."""
        self._on_timeout(call)


class _Place:
    """One call's place in a queue."""

    __slots__ = ("_slots", "call", "left")

    def __init__(self, slots: Slots, call: Call) -> None:
        self._slots = slots
        self.call = call
        self.left = False

    def expire(self) -> None:
        if not self.left:
            self.left = True
            self._slots.timed_out(self.call)
