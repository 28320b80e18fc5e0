"""Idempotency keys: the first call of a key runs, every repeat is told what came of it, whatever happened between."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from types import MappingProxyType
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from spine import AuthorityDecision, OperationContext, OperationResult, Settings, Spine
from tests.governed import intact, journal, query, running, together, until

pytestmark = pytest.mark.anyio


class Till:
    """A Spine whose ``till.pay`` numbers its payments; it fails, waits or is denied as it is told."""

    def __init__(self, url: str, *, idempotent: bool = False, **settings: Any) -> None:
        self.url = url
        self.spine = Spine(url, settings=Settings(**settings))
        self.paid = 0
        self.asked = 0
        self.attempts: list[int] = []
        self.deny = False
        self.leave = asyncio.Event()
        self.leave.set()

        @self.spine.rule("till.*")
        def closed(ctx: OperationContext) -> AuthorityDecision:
            self.asked += 1
            return (
                AuthorityDecision.deny("the till is closed", code="CLOSED") if self.deny else AuthorityDecision.allow()
            )

        @self.spine.operation("till.pay", idempotent=idempotent)
        @self.spine.operation("till.refund", idempotent=idempotent)
        @self.spine.operation("till.single", idempotent=idempotent, concurrency=1)
        @self.spine.operation("till.buffered", idempotent=idempotent, durability="buffered")
        async def pay(ctx: OperationContext) -> Mapping[str, Any]:
            self.paid += 1
            self.attempts.append(ctx.attempt)
            await self.leave.wait()
            if ctx.params.get("fail"):
                raise ConnectionError("the bank is away")
            return {"payment": self.paid, "key": ctx.idempotency_key}

    async def pay(self, key: str | None = "k1", operation: str = "till.pay", **call: Any) -> OperationResult:
        return await self.spine.execute(
            operation, **{"tenant_id": "acme", "params": {"cents": 5}, "idempotency_key": key, **call}
        )


@pytest.fixture
async def till(sqlite_url: str) -> Till:
    return Till(sqlite_url)


def same(one: OperationResult, other: OperationResult) -> bool:
    """Whether two callers were told the same."""
    fields = ("success", "data", "error", "error_code", "operation", "decision")
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def repeated(result: OperationResult) -> bool:
    return bool(result.metadata.get("repeated", False))


# -- repeats


@pytest.mark.parametrize("operation", ["till.pay", "till.buffered"])
async def test_a_repeat_gets_the_first_result_also_after_a_restart(database_url: str, operation: str) -> None:
    """Same tenant, operation, key and params: the handler ran once, each is told the same, durably."""
    till = Till(database_url)
    async with running(till.spine):
        first = await till.pay(operation=operation, run_id="run-1")
        later = await till.pay(operation=operation, run_id="run-1")
    again = Till(database_url)
    async with running(again.spine):
        after = await again.pay(operation=operation, run_id="run-1")
    assert first.data == {"payment": 1, "key": "k1"}
    assert first.durable
    assert not repeated(first)
    for repeat in (later, after):
        assert same(first, repeat)
        assert repeated(repeat)
        assert repeat.durable
        assert repeat.metadata["decision_id"] == first.metadata["decision_id"]
    assert (till.paid, again.paid) == (1, 0)
    assert len(journal(database_url, "decision")) == 1
    intact(database_url)


async def test_repeats_at_the_same_time_wait_for_the_first(database_url: str) -> None:
    """From two processes at once: one of twenty runs, all get its result."""
    here, there = Till(database_url), Till(database_url)
    async with running(here.spine, there.spine):
        with anyio.fail_after(20):
            results = await together(*[partial(till.pay) for till in (here, there)] * 10)
    assert here.paid + there.paid == 1
    assert all(result.success for result in results)
    assert all(result.data == {"payment": 1, "key": "k1"} for result in results)
    assert sum(not repeated(result) for result in results) == 1
    assert len([body for body in journal(database_url, "decision") if body["key"] == "k1"]) == 1
    intact(database_url)


async def test_keys_belong_to_a_tenant_and_an_operation(till: Till) -> None:
    """The same key of another tenant or operation is another key; without a key nothing is remembered."""
    async with running(till.spine):
        for call in (
            {},
            {"tenant_id": "other"},
            {"operation": "till.refund"},
            {"key": "k2"},
            {"key": None},
            {"key": None},
        ):
            assert not repeated(await till.pay(**call))
        assert till.paid == 6
        for call in ({}, {"tenant_id": "other"}, {"operation": "till.refund"}, {"key": "k2"}):
            assert repeated(await till.pay(**call))
    assert till.paid == 6


async def test_other_params_under_a_used_key_are_a_conflict(till: Till) -> None:
    """While the first runs and after it ended: IDEMPOTENCY_CONFLICT, recorded, and the first result stands."""
    till.leave.clear()
    async with running(till.spine):
        first = asyncio.create_task(till.pay())
        await until(lambda: till.paid == 1)
        during = await till.pay(params={"cents": 6})
        till.leave.set()
        done = await first
        after = await till.pay(params={"cents": 5.5})
        assert same(done, await till.pay())
        # The order of keys is no difference.
        assert not repeated(await till.pay("k3", params={"a": 1, "b": 2}))
        assert repeated(await till.pay("k3", params={"b": 2, "a": 1}))
    for conflict in (during, after):
        assert (conflict.success, conflict.error_code) == (False, "IDEMPOTENCY_CONFLICT")
        assert "k1" in str(conflict.error)
    recorded = [body for body in journal(till.url, "decision") if body["code"] == "IDEMPOTENCY_CONFLICT"]
    assert [(body["key"], body["final"]) for body in recorded] == [(None, True)] * 2
    assert till.paid == 2


async def test_a_denial_is_stored_and_repeated(sqlite_url: str) -> None:
    """The rules are not asked again under the same key, in this process or the next, though they would allow now."""
    till = Till(sqlite_url)
    till.deny = True
    async with running(till.spine):
        first = await till.pay()
        till.deny = False
        later = await till.pay()
        assert (await till.pay("k2")).success
    again = Till(sqlite_url)
    async with running(again.spine):
        after = await again.pay()
    assert first.error_code == "CLOSED"
    for repeat in (later, after):
        assert same(first, repeat)
        assert repeated(repeat)
        assert repeat.decision is not None
        assert not repeat.decision.allowed
    assert (till.asked, again.asked, till.paid, again.paid) == (2, 0, 1, 0)


@pytest.mark.parametrize("how", ["raises", "times out"])
async def test_a_failure_is_stored_and_repeated(sqlite_url: str, how: str) -> None:
    """The handler ran and may have had an effect: it is not run again under the same key."""
    till = Till(sqlite_url)
    call: dict[str, Any] = {"params": {"fail": True}}
    if how == "times out":
        till.leave.clear()
        call = {"timeout_s": 0.1}
    async with running(till.spine):
        first = await till.pay(**call)
        till.leave.set()
        later = await till.pay(**call)
    again = Till(sqlite_url)
    async with running(again.spine):
        after = await again.pay(**call)
    assert first.error_code == {"raises": "HANDLER_EXCEPTION:ConnectionError", "times out": "TIMEOUT"}[how]
    assert same(first, later)
    assert same(first, after)
    assert (till.paid, again.paid) == (1, 0)


async def test_what_never_claimed_the_key_leaves_it_free(till: Till) -> None:
    """Refused before it was decided on - wrong params, unknown, another tenant's run - it is no answer to a repeat."""
    async with running(till.spine):
        await till.spine.start_run("hers", tenant_id="other")
        assert (await till.pay(params={"cents": float("nan")})).error_code == "INVALID_PARAMS"
        assert (await till.pay(operation="till.steal")).error_code == "UNKNOWN_OPERATION"
        assert (await till.pay(run_id="hers")).error_code == "TENANT_MISMATCH"
        assert (await till.pay(timeout_s=1e-9)).error_code == "TIMEOUT"
        assert (await till.pay(timeout_s=-1)).error_code == "INVALID_PARAMS"
        result = await till.pay()
    assert result.success
    assert not repeated(result)
    assert till.paid == 1


async def test_a_repeat_with_less_time_than_the_first_takes_gives_up_alone(till: Till) -> None:
    """TIMEOUT for the repeat; the first goes on, and is there for the next one."""
    till.leave.clear()
    async with running(till.spine):
        first = asyncio.create_task(till.pay())
        await until(lambda: till.paid == 1)
        with anyio.fail_after(5):
            impatient = await till.pay(timeout_s=0.1)
        assert (impatient.success, impatient.error_code) == (False, "TIMEOUT")
        till.leave.set()
        assert (await first).success
        assert same(await first, await till.pay())
    assert till.paid == 1


async def test_the_first_callers_departure_does_not_take_the_result_away(till: Till) -> None:
    """It is cancelled while its handler runs: the repeat waits for what it started."""
    till.leave.clear()
    async with running(till.spine):
        first = asyncio.create_task(till.pay())
        await until(lambda: till.paid == 1)
        first.cancel()
        await asyncio.wait([first])
        repeat = asyncio.create_task(till.pay())
        await asyncio.sleep(0)
        till.leave.set()
        assert (await repeat).data == {"payment": 1, "key": "k1"}
        assert repeated(await repeat)
    assert till.paid == 1


# -- interruptions


async def interrupted(url: str, *, idempotent: bool = False) -> Till:
    """A Spine that was stopped while it paid: the outcome is INTERRUPTED."""
    till = Till(url, idempotent=idempotent, drain_s=0.05)
    till.leave.clear()
    async with running(till.spine):
        call = asyncio.create_task(till.pay())
        await until(lambda: till.paid == 1)
    assert (await call).error_code == "INTERRUPTED"
    return till


async def test_an_interrupted_call_is_in_doubt(database_url: str) -> None:
    """Nobody knows what it did: it is not run again under its key, however often asked; a new key runs."""
    await interrupted(database_url)
    till = Till(database_url)
    async with running(till.spine):
        for _ in range(2):
            result = await till.pay()
            assert (result.success, result.error_code) == (False, "IN_DOUBT")
            assert "k1" in str(result.error)
        assert (await till.pay(params={"cents": 6})).error_code == "IDEMPOTENCY_CONFLICT"
        assert (await till.pay("k2")).success
    assert till.paid == 1
    intact(database_url)


async def test_an_interrupted_idempotent_call_runs_again_as_the_next_attempt(database_url: str) -> None:
    """Declared idempotent, it is tried again, once at a time, and told which attempt it is; then its result stands."""
    await interrupted(database_url, idempotent=True)
    till = Till(database_url, idempotent=True, drain_s=0.05)
    till.leave.clear()
    async with running(till.spine):
        call = asyncio.create_task(till.pay())
        await until(lambda: till.paid == 1)
    assert (await call).error_code == "INTERRUPTED"
    last = Till(database_url, idempotent=True)
    async with running(last.spine):
        results = await together(*[last.pay] * 5)
        assert all(result.success for result in results)
        assert sum(not repeated(result) for result in results) == 1
    assert (till.attempts, last.attempts) == ([2], [3])
    decisions = [body for body in journal(database_url, "decision") if body["key"] == "k1"]
    assert [body["attempt"] for body in decisions] == [1, 2, 3]
    assert query(database_url, "SELECT state FROM idempotency") == [("done",)]
    intact(database_url)


async def test_two_processes_that_retry_an_interrupted_call_run_it_once(database_url: str) -> None:
    """Only one of them claims the next attempt; the other waits for it and is told its result."""
    await interrupted(database_url, idempotent=True)
    here, there = Till(database_url, idempotent=True), Till(database_url, idempotent=True)
    async with running(here.spine, there.spine):
        with anyio.fail_after(20):
            results = await together(here.pay, there.pay, here.pay, there.pay)
    assert here.paid + there.paid == 1
    assert all(result.success for result in results)
    intact(database_url)


async def test_what_was_cancelled_while_it_waited_for_its_slot_has_not_used_the_key(till: Till) -> None:
    """It never started: the repeat runs."""
    till.leave.clear()
    async with running(till.spine):
        holder = asyncio.create_task(till.pay("other", "till.single"))
        await until(lambda: till.paid == 1)
        waiting = asyncio.create_task(till.pay("k1", "till.single"))
        while not (await till.spine.status())["operations"]["till.single"]["waiting"]:
            await anyio.lowlevel.checkpoint()
        waiting.cancel()
        till.leave.set()
        assert (await holder).success
        result = await till.pay("k1", "till.single")
        assert result.success
        assert not repeated(result)


# -- what can be kept


class Receipt(BaseModel):
    number: int
    at: datetime
    cents: Decimal


@pytest.mark.parametrize(
    ("kind", "value", "kept"),
    [
        ("sqlite", {"a": [1, None, "x"]}, {"a": [1, None, "x"]}),
        ("sqlite", None, {}),
        ("sqlite", MappingProxyType({"a": 1}), {"a": 1}),
        (
            "sqlite",
            Receipt(number=1, at=datetime(2024, 2, 29, tzinfo=UTC), cents=Decimal("1.10")),
            {"number": 1, "at": "2024-02-29T00:00:00+00:00", "cents": "1.10"},
        ),
        ("sqlite", {"nul": "a\x00b"}, {"nul": "a\x00b"}),
        pytest.param("postgresql", {"nul": "a\x00b"}, {"nul": "a\x00b"}, marks=pytest.mark.postgresql),
    ],
    ids=["dict", "None", "mapping", "model", "NUL", "NUL on PostgreSQL"],
)
async def test_a_keyed_result_is_kept_as_it_was_first_told(
    request: pytest.FixtureRequest, kind: str, value: Any, kept: Any
) -> None:
    """Whatever a handler may return comes back the same, now and from the record of another process."""
    database_url: str = request.getfixturevalue(f"{kind}_url")

    def spine() -> Spine:
        made = Spine(database_url)

        @made.operation("till.print")
        async def print_(ctx: OperationContext) -> Any:
            return value

        return made

    told = []
    for _ in range(2):
        one = spine()
        async with running(one):
            told += [await one.execute("till.print", tenant_id="acme", idempotency_key="k") for _ in range(2)]
    assert [(result.success, result.error, result.data) for result in told] == [(True, None, kept)] * 4
    assert [repeated(result) for result in told] == [False, True, True, True]
    intact(database_url)


def deep() -> dict[str, Any]:
    value: Any = 1
    for _ in range(2_000):
        value = [value]
    return {"deep": value}


@pytest.mark.parametrize(
    "value",
    [{"a": object()}, {"a": {1, 2}}, {"a": "\ud800"}, {"a": "x" * 5_000_000}, deep(), {1: 1}, {"a": 2**70}],
    ids=["object", "set", "surrogate", "5 MB", "deep", "integer key", "2**70"],
)
async def test_a_keyed_result_that_cannot_be_kept_is_a_failure_for_all(till: Till, value: Any) -> None:
    """The handler ran, its result cannot be given again: the first caller is told what every repeat will be told."""
    spine = Spine(till.url)
    ran = 0

    @spine.operation("till.odd")
    async def odd(ctx: OperationContext) -> Any:
        nonlocal ran
        ran += 1
        return value

    async with running(spine):
        first, second = [await spine.execute("till.odd", tenant_id="acme", idempotency_key="k") for _ in range(2)]
        assert (await spine.execute("till.odd", tenant_id="acme")).success, "without a key nothing need be kept"
    assert str(first.error_code).startswith("HANDLER_EXCEPTION:")
    assert same(first, second)
    assert ran == 2
