"""Law 6 again: nothing waits for ever. A completion waits for another one, for a domain, for a publisher: bounded."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from spine import Spine, TransactionFailed
from spine.governance.transactions import CompleteRun
from tests.governed import running, until
from tests.participants import Held, Remote, World, complete, over, transactions

pytestmark = pytest.mark.anyio


@pytest.fixture
def world() -> World:
    return World()


def at_work(spine: Spine) -> int:
    """How many completions its coordinator is at work on."""
    tasks = spine._system.supervisor._children["coordinator"].actor._tasks._tasks  # type: ignore[union-attr]
    return len([task for task in tasks if task.get_name() == "CompleteRun"])


async def test_who_waits_for_another_completion_waits_no_longer_than_its_caller(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's domain takes its time; when the second one's caller has gone nothing of it is left."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=held))
    async with running(spine):
        first = asyncio.ensure_future(complete(spine))
        await held.reached.wait()
        monkeypatch.setattr(CompleteRun, "timeout_s", 0.2)
        with pytest.raises(TransactionFailed, match="no reply within its deadline"):
            await complete(spine)
        await until(lambda: at_work(spine) == 1)
        held.let_go.set()
        assert (await first).is_complete


async def test_a_stop_does_not_wait_for_a_transaction_that_another_spine_drives(sqlite_url: str, world: World) -> None:
    """Its caller is told that the transaction goes on, and hears so before the stop would cut it off."""
    held = Held()
    drives, waits = over(sqlite_url, Remote(world, forward=held)), over(sqlite_url, drain_s=0.1)
    async with running(drives):
        first = asyncio.ensure_future(complete(drives))
        await held.reached.wait()
        async with running(waits):
            second = asyncio.ensure_future(complete(waits))
            await until(lambda: waits.health().messages.in_flight)
            with anyio.fail_after(10):
                await waits.stop()
            with pytest.raises(TransactionFailed) as told:
                await second
        assert (told.value.code, told.value.phase) == ("IN_FLIGHT", "FAILED")
        assert transactions(sqlite_url) == ["EXECUTING"]
        held.let_go.set()
        assert (await first).is_complete
