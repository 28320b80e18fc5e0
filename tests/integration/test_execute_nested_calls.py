"""Calls inside calls are bounded, never deadlock, and end with the handler that made them."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import anyio
import pytest

from actors.calls import Call
from spine import OperationContext, OperationResult
from spine.kernel.errors import ConfigurationError
from tests.governed import intact, journal, running, together, until
from tests.integration.desk import Desk, sound
from tests.stubborn import swallow_cancellation

pytestmark = pytest.mark.anyio


async def test_an_operation_that_calls_itself_without_end_ends_overloaded(sqlite_url: str) -> None:
    """Every nested call takes a credit: the bomb goes as deep as there are credits, and nothing of it stays."""
    desk = Desk(sqlite_url, credits=150)
    deepest = 0

    @desk.spine.operation("desk.bomb", concurrency=1_000_000)
    async def bomb(ctx: OperationContext) -> OperationResult:
        nonlocal deepest
        deepest += 1
        return await ctx.execute("desk.bomb")

    async with running(desk.spine):
        for _ in range(3):
            deepest = 0
            with anyio.fail_after(20):
                result = sound(await desk.execute("desk.bomb", run_id="run-1"), "desk.bomb")
            assert result.error_code == "OVERLOADED"
            assert deepest == 150
            await until(lambda: desk.credits_in_use == 0)
        assert sound(await desk.execute()).success
        assert sum(len(mailbox) for mailbox in desk.spine._system.exchange.mailboxes.values()) == 0
        gc.collect()
        exchange = desk.spine._system.exchange
        left = [o for o in gc.get_objects() if isinstance(o, Call) and o.envelope.exchange is exchange]
        # An actor's loop still knows the message it handled last.
        assert len(left) <= len(exchange.mailboxes)
    assert len(journal(sqlite_url, "outcome")) == 3 * 150 + 1
    intact(sqlite_url)


async def test_a_limited_operation_that_calls_itself_ends_at_its_limit(desk: Desk) -> None:
    """A nested call never waits for a slot: OVERLOADED instead, and the refusal is recorded."""
    depth = 0

    @desk.spine.operation("desk.bomb", concurrency=5)
    async def bomb(ctx: OperationContext) -> OperationResult:
        nonlocal depth
        depth += 1
        return sound(await ctx.execute("desk.bomb"), "desk.bomb")

    async with running(desk.spine):
        with anyio.fail_after(10):
            assert sound(await desk.execute("desk.bomb")).error_code == "OVERLOADED"
    assert depth == 5
    refused = [body for body in journal(desk.url, "decision") if not body["allowed"]]
    assert [body["code"] for body in refused] == ["OVERLOADED"]
    assert "concurrency" in refused[0]["reason"]


async def test_a_fan_of_nested_calls_is_bounded_and_every_one_is_answered(sqlite_url: str) -> None:
    """Thousands at once from one handler: as many as there is room for run, each of the rest is told OVERLOADED."""
    desk = Desk(sqlite_url, credits=40)

    @desk.spine.operation("desk.fan")
    async def fan(ctx: OperationContext) -> dict[str, Any]:
        results = await together(*[partial(ctx.execute, "desk.quick")] * 2_000)
        codes = [sound(result).error_code for result in results]
        return {"ran": codes.count(None), "refused": codes.count("OVERLOADED")}

    async with running(desk.spine):
        with anyio.fail_after(20):
            result = sound(await desk.execute("desk.fan"))
    assert result.data is not None
    assert result.data["ran"] + result.data["refused"] == 2_000
    assert result.data["ran"] == desk.entered == 39


async def test_two_limited_operations_that_call_each_other_cannot_deadlock(desk: Desk) -> None:
    """Each holds its one slot and wants the other's: both are refused the nested call, at once, and end."""
    meet = anyio.Event()
    inside = 0

    def partner(name: str, other: str) -> None:
        @desk.spine.operation(name, concurrency=1)
        async def handler(ctx: OperationContext) -> OperationResult:
            nonlocal inside
            inside += 1
            if inside == 2:
                meet.set()
            await meet.wait()
            return sound(await ctx.execute(other))

    partner("desk.ping", "desk.pong")
    partner("desk.pong", "desk.ping")
    async with running(desk.spine):
        with anyio.fail_after(5):
            results = await together(partial(desk.execute, "desk.ping"), partial(desk.execute, "desk.pong"))
        assert [sound(result).error_code for result in results] == ["OVERLOADED", "OVERLOADED"]


@pytest.mark.parametrize("end", ["returned", "timed out"])
async def test_nothing_is_executed_for_a_handler_that_has_ended(desk: Desk, end: str) -> None:
    """Once its outcome is recorded, neither a context kept for later nor a call not yet awaited runs anything."""
    kept: list[Any] = []

    @desk.spine.operation("desk.keeper", timeout_s=1)
    async def keeper(ctx: OperationContext) -> None:
        kept.extend((ctx.execute, ctx.execute("desk.quick")))
        if end == "timed out":
            await swallow_cancellation(desk.leave)

    async with running(desk.spine):
        assert sound(await desk.execute("desk.keeper", run_id="run-1")).success is (end == "returned")
        execute, pending = kept
        for late in (pending, execute("desk.quick")):
            with pytest.raises(ConfigurationError, match=r"'desk\.keeper' after its end"):
                await late
        desk.leave.set()
    assert desk.entered == 0
    assert [body["operation"] for body in journal(desk.url, "decision")] == ["desk.keeper"]
