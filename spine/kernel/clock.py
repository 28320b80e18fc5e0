"""Time as a port: the system's, or a virtual one that tests advance."""

from __future__ import annotations

import heapq
import itertools
import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """Where every part of Spine reads the time."""

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...

    def time_us(self) -> int:
        """Wall time in unix microseconds."""
        ...

    async def sleep_until(self, moment: float) -> None:
        """Return once ``monotonic()`` has reached ``moment`` (seconds)."""
        ...


class SystemClock:
    """The machine's own clock."""

    __slots__ = ()

    monotonic = staticmethod(time.monotonic)

    def time_us(self) -> int:
        """Wall time in unix microseconds."""
        return time.time_ns() // 1000

    async def sleep_until(self, moment: float) -> None:
        """Sleep on the event loop until ``moment`` (monotonic seconds)."""
        await anyio.sleep(max(0.0, moment - time.monotonic()))


class VirtualClock:
    """A clock that stands still until ``advance`` moves it; one event loop only."""

    def __init__(self, start_us: int = 0) -> None:
        self._now = 0.0
        self._start_us = start_us
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, anyio.Event]] = []

    def monotonic(self) -> float:
        """Virtual seconds since the clock was made."""
        return self._now

    def time_us(self) -> int:
        """Virtual wall time in unix microseconds."""
        return self._start_us + round(self._now * 1_000_000)

    async def sleep_until(self, moment: float) -> None:
        """Wait until ``advance`` has carried the clock to ``moment``."""
        if moment <= self._now:
            await anyio.lowlevel.checkpoint()
            return
        event = anyio.Event()
        heapq.heappush(self._sleepers, (moment, next(self._order), event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        """Move the clock ``seconds`` (>= 0) on, waking each sleeper at its own moment, in order."""
        target = self._now + seconds
        while self._sleepers and self._sleepers[0][0] <= target:
            self._now, _, event = heapq.heappop(self._sleepers)
            event.set()
            await anyio.wait_all_tasks_blocked()
        self._now = target
        await anyio.lowlevel.checkpoint()
