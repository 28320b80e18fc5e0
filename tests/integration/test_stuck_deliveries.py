"""What waits for the publisher too long is visible, however few tries that took."""

from __future__ import annotations

import asyncio
import time

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
