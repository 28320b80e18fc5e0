"""Law 6 again: every queue has a bound, and the receipt of a stop tells of a domain's call that will not end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from spine import Event
from tests.governed import query, running, until
from tests.participants import Remote, World, complete, over

pytestmark = pytest.mark.anyio


async def test_runs_whose_events_are_being_delivered_are_bounded(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lines where four runs commit while the publisher hangs: the others wait in the journal, and come later."""
    monkeypatch.setattr("actors.outbox.LINES_MOST", 2)
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.1)
    asked, let_go = list[str](), asyncio.Event()

    class Hangs:
        async def publish(self, event: Event) -> None:
            asked.append(event.run_id)
            await let_go.wait()

    spine = over(sqlite_url, publisher=Hangs())
    async with running(spine):
        first = [asyncio.ensure_future(complete(spine, f"run-{n}")) for n in range(2)]
        await until(lambda: len(asked) == 2)
        assert [(await complete(spine, f"more-{n}")).phase for n in range(2)] == ["COMMITTED", "COMMITTED"]
        assert len(asked) == 2
        let_go.set()
        await asyncio.gather(*first)
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    assert sorted(asked) == ["more-0", "more-1", "run-0", "run-1"]


async def test_the_receipt_tells_of_a_call_that_will_not_end(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain swallows its cancellation: the stop goes on without it and says that it is left behind."""
    monkeypatch.setattr("actors.coordinator.STOP_S", 0.2)
    reached, let_go, over_now = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stubborn(do: Callable[[], Any]) -> Any:
        reached.set()
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        over_now.set()

    spine = over(sqlite_url, Remote(World(), forward=stubborn), drain_s=0.1)
    async with running(spine):
        caller = asyncio.ensure_future(complete(spine))
        await reached.wait()
        receipts = {receipt.child: receipt.end for receipt in await spine.stop()}
        await asyncio.wait([caller])
        assert caller.cancelled() or caller.exception() is not None
    assert receipts["coordinator"] == "leaked"
    let_go.set()
    await over_now.wait()
