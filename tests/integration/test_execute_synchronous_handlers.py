"""Synchronous handlers run in threads of their own and hold up nobody else."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest

from spine import OperationContext
from tests.governed import journal, running, until
from tests.integration.desk import Desk, sound

pytestmark = pytest.mark.anyio


async def test_a_synchronous_handler_runs_off_the_loop_and_may_call_operations_through_it(desk: Desk) -> None:
    """Its thread is not the loop's; nested calls go through anyio's bridge; results and exceptions are as usual."""
    threads: list[int] = []

    @desk.spine.operation("desk.sync")
    def sync(ctx: OperationContext) -> dict[str, Any]:
        threads.append(threading.get_ident())
        if ctx.params.get("raise"):
            raise ValueError("bad value")
        nested = anyio.from_thread.run(ctx.execute, "desk.quick", {})
        return {"nested": nested.success}

    async with running(desk.spine):
        result = sound(await desk.execute("desk.sync", run_id="run-1"))
        assert result.data == {"nested": True}
        raised = sound(await desk.execute("desk.sync", params={"raise": True}))
        assert raised.error_code == "HANDLER_EXCEPTION:ValueError"
    assert threading.get_ident() not in threads
    outer, inner = journal(desk.url, "decision")[:2]
    assert inner["parent"] == outer["decision_id"]
    assert inner["run_id"] == "run-1"


async def test_a_synchronous_handler_that_calls_execute_in_its_own_thread_is_told_how(desk: Desk) -> None:
    """Nobody awaits there: an error at once that names the way, not a call that silently never happens."""

    @desk.spine.operation("desk.sync")
    def sync(ctx: OperationContext) -> dict[str, Any]:
        return {"nested": str(ctx.execute("desk.quick"))}

    async with running(desk.spine):
        result = sound(await desk.execute("desk.sync"))
    assert result.error_code == "HANDLER_EXCEPTION:ConfigurationError"
    assert "'desk.sync'" in str(result.error) and "anyio.from_thread.run(ctx.execute" in str(result.error)
    assert desk.entered == 0


async def test_a_synchronous_handler_that_hangs_is_answered_for_and_its_thread_abandoned(desk: Desk) -> None:
    """Threads cannot be cancelled: the caller gets TIMEOUT all the same."""
    leave = threading.Event()

    @desk.spine.operation("desk.hang", timeout_s=1)
    def hang(ctx: OperationContext) -> None:
        leave.wait(30)

    try:
        async with running(desk.spine):
            with anyio.fail_after(5):
                result = sound(await desk.execute("desk.hang"))
            assert result.error_code == "TIMEOUT"
    finally:
        leave.set()


async def test_slow_synchronous_handlers_of_one_operation_delay_no_other(desk: Desk) -> None:
    """Sixty calls that hold their threads leave another synchronous operation its own."""
    leave = threading.Event()
    held = threading.Semaphore(0)

    @desk.spine.operation("desk.hold")
    def hold(ctx: OperationContext) -> None:
        held.release()
        leave.wait(30)

    @desk.spine.operation("desk.fast")
    def fast(ctx: OperationContext) -> None:
        return None

    async with running(desk.spine), anyio.create_task_group() as group:
        try:
            for _ in range(60):
                group.start_soon(partial(desk.execute, "desk.hold"))
            await until(lambda: sum(1 for d in journal(desk.url, "decision") if d["operation"] == "desk.hold") == 60)
            with anyio.fail_after(5):
                assert sound(await desk.execute("desk.fast", timeout_s=2)).success
        finally:
            leave.set()
