"""Law 4 again: in order per run, also where the outbox had no room for one of a run's events and has for the next."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from spine import Event
from tests.governed import Published, query, running, until
from tests.participants import complete, over

pytestmark = pytest.mark.anyio


class Gated(Published):
    """Takes a run's events only once that run's gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.asked: list[str] = []

    async def publish(self, event: Event) -> None:
        self.asked.append(event.run_id)
        await self.gates[event.run_id].wait()
        await super().publish(event)


async def test_nothing_of_a_run_follows_what_found_no_room_while_its_line_goes_on(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is under way, the second finds the outbox full, and there is room again when the third is committed."""
    monkeypatch.setattr("actors.outbox.QUEUED_MOST", 2)
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.1)
    publisher = Gated()
    spine = over(sqlite_url, publisher=publisher)
    async with running(spine):
        first = asyncio.ensure_future(complete(spine, completion_key="first"))
        await until(lambda: "run-1" in publisher.asked)
        other = asyncio.ensure_future(complete(spine, "other"))
        await until(lambda: "other" in publisher.asked)
        second = await complete(spine, completion_key="second")
        publisher.gates["other"].set()
        await other
        third = await complete(spine, completion_key="third")
        publisher.gates["run-1"].set()
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
        told = [event.tx_id for event in publisher.events if event.run_id == "run-1"]
        assert told == [(await first).transaction_id, second.transaction_id, third.transaction_id]
