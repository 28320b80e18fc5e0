"""One timer for many deadlines: a wheel of 10 ms buckets that costs a dict entry each."""

from __future__ import annotations

import asyncio
import heapq
from types import TracebackType
from typing import Final, Protocol

import anyio

from spine.kernel.clock import Clock

_PER_SECOND = 100
AGAIN_S: Final = 1.0


class Expiring(Protocol):
    """Something that a deadline ends."""

    def expire(self) -> None:
        """Called once, on the event loop, at most 10 ms after the deadline."""
        ...


class Deadlines:
    """Calls ``expire()`` of what is still here when its deadline has passed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buckets: dict[int, dict[Expiring, None]] = {}
        self._ticks: list[int] = []
        self._sleep: anyio.CancelScope | None = None

    def add(self, moment: float, item: Expiring) -> None:
        """Watch ``item`` until ``moment`` (monotonic seconds)."""
        tick = int(moment * _PER_SECOND) + 1
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = {item: None}
            heapq.heappush(self._ticks, tick)
            if self._sleep is not None and self._ticks[0] == tick:
                self._sleep.cancel()
        else:
            bucket[item] = None

    def discard(self, moment: float, item: Expiring) -> None:
        """Stop watching ``item``, added with the same ``moment``."""
        bucket = self._buckets.get(int(moment * _PER_SECOND) + 1)
        if bucket is not None:
            bucket.pop(item, None)

    def limit(self, seconds: float) -> TimeLimit:
        """For a ``with``: TimeoutError after ``seconds`` in the task that is in it then; cheaper than a scope."""
        return TimeLimit(self, self._clock, seconds)

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    async def run(self) -> None:
        """Serve the deadlines until cancelled."""
        while True:
            with anyio.CancelScope() as self._sleep:
                if self._ticks:
                    await self._clock.sleep_until(self._ticks[0] / _PER_SECOND)
                else:
                    await anyio.sleep_forever()
            self._sleep = None
            self._expire(self._clock.monotonic())
            await anyio.lowlevel.checkpoint()

    def _expire(self, now: float) -> None:
        while self._ticks and self._ticks[0] / _PER_SECOND <= now:
            for item in self._buckets.pop(heapq.heappop(self._ticks)):
                item.expire()


class TimeLimit:
    """Raises TimeoutError in the task that entered it when it has not left it after ``seconds``.

    What swallows its cancellation is cancelled again each ``AGAIN_S`` seconds.
    """

    __slots__ = ("_cancelled", "_cancelling", "_deadlines", "_moment", "_now", "_task")

    def __init__(self, deadlines: Deadlines, clock: Clock, seconds: float) -> None:
        self._deadlines = deadlines
        self._now = clock.monotonic
        self._moment = clock.monotonic() + seconds
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._cancelled = 0

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._deadlines.add(self._moment, self)

    def expire(self) -> None:
        """Called by the timer."""
        assert self._task is not None
        self._cancelled += 1
        self._task.cancel()
        self._moment = self._now() + AGAIN_S
        self._deadlines.add(self._moment, self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._deadlines.discard(self._moment, self)
        if not self._cancelled:
            return
        assert self._task is not None
        left = self._task.cancelling()
        for _ in range(self._cancelled):
            left = self._task.uncancel()
        # Somebody else's cancellation goes on, whatever the time.
        if left <= self._cancelling and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError("it did not end within its time limit") from error
