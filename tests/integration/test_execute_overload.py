"""More calls than there is room for: they are told so at once, or wait their turn."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import anyio
import pytest

from spine import OperationContext, TransactionFailed
from tests.governed import running, together, until
from tests.integration.desk import Desk, complete, sound

pytestmark = pytest.mark.anyio


async def test_a_full_mailbox_answers_at_once_or_waits_as_long_as_it_was_told(sqlite_url: str) -> None:
    """OVERLOADED immediately; with ``wait=True`` after the caller's own time, or when there is room, the work."""
    desk = Desk(sqlite_url, credits=2)
    async with running(desk.spine), anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(partial(desk.execute, "desk.slow"))
        await until(lambda: desk.entered == 2)
        began = time.monotonic()
        assert sound(await desk.execute(), "desk.quick").error_code == "OVERLOADED"
        assert time.monotonic() - began < 1
        start = await desk.spine.start_run("run-1", tenant_id="acme")
        assert (start.allowed, start.code) == (False, "OVERLOADED")
        with pytest.raises(TransactionFailed) as failure:
            await complete(desk, "run-1")
        assert failure.value.code == "OVERLOADED"

        began = time.monotonic()
        assert sound(await desk.execute(wait=True, timeout_s=0.2)).error_code == "OVERLOADED"
        assert 0.15 < time.monotonic() - began < 2
        waiting = asyncio.create_task(desk.execute(wait=True, timeout_s=20))
        await asyncio.sleep(0)
        assert not waiting.done()
        with anyio.fail_after(5):
            halted = await desk.spine.halt(reason="even now", actor="ann")
            assert halted.mode == "halted"
            await desk.spine.restore(reason="over", actor="ann")
        desk.leave.set()
        assert sound(await waiting).success
    assert desk.credits_in_use == 0
    assert desk.entered == 3


async def test_no_more_calls_of_an_operation_run_than_its_limit_and_they_start_in_turn(desk: Desk) -> None:
    """Concurrency three: never four at once, and who came first is served first."""
    order: list[int] = []
    inside = most = 0

    @desk.spine.operation("desk.three", concurrency=3)
    async def three(ctx: OperationContext) -> dict[str, Any]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        order.append(ctx.params["n"])
        for _ in range(5):
            await asyncio.sleep(0)
        inside -= 1
        return {}

    async with running(desk.spine):
        calls = [partial(desk.execute, "desk.three", params={"n": n}) for n in range(30)]
        assert all(sound(result).success for result in await together(*calls))
    assert most == 3
    assert order[3:] == sorted(order[3:])
