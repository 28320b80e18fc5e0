"""What waits for the publisher too long is visible, however few tries that took."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from spine import Event
from spine.kernel.clock import VirtualClock
from tests.governed import journal, running, until
from tests.participants import complete, over

pytestmark = pytest.mark.anyio


class Hangs:
    """A publisher that does not answer until it is let go."""

    def __init__(self) -> None:
        self.tries = 0
        self.let_go = asyncio.Event()

    async def publish(self, event: Event) -> None:
        self.tries += 1
        await self.let_go.wait()


async def test_a_delivery_that_waits_for_half_a_minute_is_stuck(sqlite_url: str) -> None:
    """Counted in health from then on until it is through; each try may take ten seconds, so there were hardly any."""
    clock, publisher = VirtualClock(time.time_ns() // 1000), Hangs()
    spine = over(sqlite_url, publisher=publisher, clock=clock)

    def stuck() -> int:
        return spine.health().transactions["events_stuck"]

    async with running(spine):
        call = asyncio.create_task(complete(spine))
        await until(lambda: publisher.tries)
        await clock.advance(2)
        assert (await call).phase == "COMMITTED"
        await clock.advance(27)
        assert stuck() == 0
        await clock.advance(2)
        assert stuck() == 1
        assert publisher.tries < 5
        publisher.let_go.set()
        await until(lambda: journal(sqlite_url, "event.published"), clock=clock)
        await until(lambda: stuck() == 0)


async def test_a_publisher_that_fails_is_given_longer_and_longer(sqlite_url: str) -> None:
    """A tenth of a second, then twice as long each time, with at most a quarter on top."""
    clock, asked = VirtualClock(time.time_ns() // 1000), list[float]()

    class Fails:
        async def publish(self, event: Event) -> None:
            asked.append(clock.monotonic())
            if len(asked) < 6:
                raise ConnectionError("the broker is away")

    spine = over(sqlite_url, publisher=Fails(), clock=clock)
    async with running(spine):
        call = asyncio.create_task(complete(spine))
        await until(lambda: asked)
        for _ in range(600):
            await clock.advance(0.01)
        assert (await call).phase == "COMMITTED"
        await until(lambda: journal(sqlite_url, "event.published"), clock=clock)
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert len(pauses) == 5
    for n, pause in enumerate(pauses):
        assert 0.1 * 2**n <= pause <= 0.125 * 2**n + 0.03
