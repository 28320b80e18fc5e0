"""A stop ends every call, under load and from inside a handler, and leaves nothing open."""

from __future__ import annotations

import gc
import threading
from functools import partial

import anyio
import pytest

from spine import OperationContext
from spine.kernel.errors import NotRunning
from tests.governed import intact, journal, query, until
from tests.integration.desk import Desk, sound

pytestmark = pytest.mark.anyio


async def test_stop_under_load_ends_every_call_and_leaves_no_decision_open(database_url: str) -> None:
    """Running calls are interrupted and recorded, waiting ones refused, new ones turned away; the receipt is clean."""
    desk = Desk(database_url, drain_s=0.2, stop_s=10)
    ends: list[str | None] = []

    async def call(operation: str, *, wait: bool = False) -> None:
        while True:
            try:
                result = sound(await desk.execute(operation, run_id="run-1", wait=wait))
            except NotRunning:
                ends.append("turned away")
                return
            ends.append(result.error_code)

    async with anyio.create_task_group() as group:
        await desk.spine.start()
        for _ in range(10):
            group.start_soon(call, "desk.quick")
            group.start_soon(call, "desk.slow")
            group.start_soon(call, "desk.single")
            group.start_soon(partial(call, "desk.quick", wait=True))
        await until(lambda: ends.count(None) > 100 and desk.entered > 110)
        with anyio.fail_after(10):
            receipts = await desk.spine.stop()
    assert {(receipt.child, receipt.end) for receipt in receipts} == {
        (child, "clean") for child in ("audit", "router", "registry", "coordinator")
    }
    assert set(ends) == {None, "INTERRUPTED", "turned away"}
    assert ends.count("turned away") == 40
    assert ends.count("INTERRUPTED") >= 20
    decisions = {body["decision_id"]: body for body in journal(database_url, "decision")}
    outcomes = [body["decision_id"] for body in journal(database_url, "outcome")]
    assert len(outcomes) == len(set(outcomes))
    assert set(outcomes) == {decision_id for decision_id, body in decisions.items() if not body["final"]}
    assert query(database_url, "SELECT count(*) FROM open_decisions") == [(0,)]
    intact(database_url)


async def test_a_handler_may_stop_its_own_spine(sqlite_url: str) -> None:
    """It cannot wait for itself for ever: it is interrupted after the drain, and the stop goes through."""
    desk = Desk(sqlite_url, drain_s=0.1, stop_s=5)

    @desk.spine.operation("desk.close")
    async def close(ctx: OperationContext) -> None:
        await desk.spine.stop()

    await desk.spine.start()
    with anyio.fail_after(8):
        result = sound(await desk.execute("desk.close"))
        assert result.error_code == "INTERRUPTED"
        await until(lambda: desk.spine._phase == "stopped")
    (outcome,) = journal(sqlite_url, "outcome")
    assert outcome["error_code"] == "INTERRUPTED"
    await until(lambda: not any("spine" in thread.name for thread in threading.enumerate()), within_s=3)
    assert {receipt.child for receipt in desk.spine._system.supervisor.receipts} == {
        "audit",
        "router",
        "registry",
        "coordinator",
    }
    gc.collect()
