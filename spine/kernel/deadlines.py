"""One timer for many deadlines: a wheel of 10 ms buckets that costs a dict entry each."""

from __future__ import annotations

import heapq
from typing import Protocol

import anyio

from spine.kernel.clock import Clock

_PER_SECOND = 100


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
