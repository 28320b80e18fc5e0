"""Bad input and faults that ``execute``, ``start_run`` and ``complete_run`` must withstand."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import pytest
from pydantic import BaseModel, model_serializer

from actors.calls import Call
from spine import AuthorityDecision, Event, OperationContext, OperationResult, Settings, Spine, TransactionFailed
from spine.governance.facade import CreatePolicyEvaluation
from spine.kernel.errors import ConfigurationError, NotRunning
from tests.governed import Published, authority_fields, intact, journal, query, running, together, until


def sound(result: OperationResult, operation: str | None = None) -> OperationResult:
    """What holds of every result, whatever ended the call."""
    assert isinstance(result, OperationResult)
    assert result.decision is not None
    assert authority_fields(result.metadata) == [], result
    assert result.success is (result.error_code is None)
    assert result.success is (result.error is None)
    assert result.duration_ms >= 0
    assert operation is None or result.operation == operation
    return result


class Desk:
    """A Spine with operations whose handlers say when they were entered and leave when told."""

    def __init__(self, url: str, publisher: Any = None, **settings: Any) -> None:
        self.url = url
        self.spine = Spine(url, publisher=publisher or Published(), settings=Settings(**settings))
        self.entered = self.left = 0
        self.leave = asyncio.Event()

        @self.spine.operation("desk.quick")
        async def quick(ctx: OperationContext) -> dict[str, Any]:
            self.entered += 1
            return {"tenant": ctx.tenant_id}

        @self.spine.operation("desk.single", concurrency=1)
        @self.spine.operation("desk.slow")
        async def slow(ctx: OperationContext) -> dict[str, Any]:
            self.entered += 1
            await self.leave.wait()
            self.left += 1
            return {}

    async def execute(self, operation: str = "desk.quick", **call: Any) -> OperationResult:
        return await self.spine.execute(operation, **{"tenant_id": "acme", **call})

    @property
    def credits_in_use(self) -> int:
        return self.spine._system.exchange.credits_in_use


@pytest.fixture
async def desk(sqlite_url: str) -> Desk:
    return Desk(sqlite_url)


pytestmark = pytest.mark.anyio

BAD_IDS: list[Any] = [
    "",
    "   ",
    "\n",
    "a\x00b",
    "a\ud800b",
    "a\nb",
    "a\x1b[31m",
    "x" * 10_000,
    5,
    b"acme",
    ["acme"],
    {},
]


# -- input


async def test_an_unknown_operation_is_a_recorded_denial(desk: Desk) -> None:
    """UNKNOWN_OPERATION, whatever was asked for: one final decision, no outcome, nothing ran."""
    names: list[Any] = ["desk.steal", "", "desk", " ", None, 5, ["desk.quick"], "a\x00.b", "\ud800.b", "x." * 5_000]
    async with running(desk.spine):
        for name in names:
            result = sound(await desk.execute(name, run_id="run-1"))
            assert result.error_code == "UNKNOWN_OPERATION", name
        assert sound(await desk.execute()).success
    *unknown, _ = journal(desk.url, "decision")
    assert len(unknown) == len(names)
    for decision in unknown:
        assert (decision["code"], decision["final"]) == ("UNKNOWN_OPERATION", True)
        assert len(decision["operation"]) <= 200
    assert len(journal(desk.url, "outcome")) == 1
    intact(desk.url)


@pytest.mark.parametrize("field", ["tenant_id", "run_id", "idempotency_key"])
async def test_an_id_that_cannot_be_one_is_a_recorded_denial(desk: Desk, field: str) -> None:
    """INVALID_PARAMS names the field; the record holds no such id, and no run begins."""
    async with running(desk.spine):
        for value in BAD_IDS:
            result = sound(await desk.execute(**{field: value}))
            assert result.error_code == "INVALID_PARAMS", value
            assert field in str(result.error), value
    decisions = journal(desk.url, "decision")
    assert len(decisions) == len(BAD_IDS)
    for decision in decisions:
        assert (decision["code"], decision["run_id"], decision["key"]) == ("INVALID_PARAMS", None, None)
        assert decision["tenant_id"] == (None if field == "tenant_id" else "acme")
    assert query(desk.url, "SELECT count(*) FROM runs") == [(0,)]
    assert desk.entered == 0
    intact(desk.url)


async def test_a_timeout_that_cannot_be_one_is_a_recorded_denial(desk: Desk) -> None:
    """INVALID_PARAMS names timeout_s, in good time."""
    async with running(desk.spine):
        for value in (0, -1, math.nan, math.inf, "5", None, True, 10**12):
            with anyio.fail_after(5):
                result = sound(await desk.execute(timeout_s=value))
            assert result.error_code == "INVALID_PARAMS", value
            assert "timeout_s" in str(result.error), value
    assert desk.entered == 0


async def test_every_wrong_id_of_a_call_is_named(desk: Desk) -> None:
    """All of them in one answer."""
    async with running(desk.spine):
        result = sound(await desk.execute(tenant_id="", run_id=5, idempotency_key="\x00", timeout_s=-1))
    for field in ("tenant_id", "run_id", "idempotency_key", "timeout_s"):
        assert field in str(result.error)


@pytest.mark.parametrize("field", ["run_id", "tenant_id", "agent_id"])
async def test_a_start_with_a_wrong_id_is_denied_and_recorded(desk: Desk, field: str) -> None:
    """A denial is returned, names the field, and is in the journal without what cannot be stored."""
    async with running(desk.spine):
        for value in BAD_IDS:
            decision = await desk.spine.start_run(**{"run_id": "run-1", "tenant_id": "acme", field: value})
            assert (decision.allowed, decision.code) == (False, "INVALID_PARAMS"), value
            assert field in decision.reason, value
    denials = journal(desk.url, "run.denied")
    assert len(denials) == len(BAD_IDS)
    for denied in denials:
        assert denied[field] is None
        assert authority_fields(denied) == []
    assert query(desk.url, "SELECT count(*) FROM runs") == [(0,)]
    intact(desk.url)


async def test_a_start_with_a_wrong_expectation_is_denied(desk: Desk) -> None:
    """Promises are (domain, action, seconds); a wrong one refuses the start and says what it should be."""
    wrong: list[Any] = [
        5,
        "abc",
        (),
        ("domain", "action"),
        ("domain", "action", 5, 6),
        ("", "action", 5),
        ("domain", None, 5),
        ("domain", "action", 0),
        ("domain", "action", math.nan),
        ("domain", "action", "5"),
        ("domain", "a\x00", 5),
    ]
    async with running(desk.spine):
        for expectation in wrong:
            decision = await desk.spine.start_run("run-1", tenant_id="acme", expectations=[expectation])
            assert (decision.allowed, decision.code) == (False, "INVALID_PARAMS"), expectation
            assert "expectation" in decision.reason, expectation
        assert (await desk.spine.start_run("run-1", tenant_id="acme", expectations=[("domain", "action", 5)])).allowed


async def test_a_completion_with_a_wrong_field_fails_naming_it(desk: Desk) -> None:
    """TransactionFailed with INVALID_PARAMS before anything begins, in good time; the run can still be completed."""
    wrong: list[tuple[str, Any]] = [
        *((field, value) for field in ("run_id", "tenant_id", "run_status") for value in BAD_IDS),
        ("agent_id", "\x00"),
        ("agent_id", 5),
        ("error_code", "\ud800"),
        ("error_code", 5),
        ("error_message", "\x00"),
        ("error_message", "\ud800"),
        ("error_message", "x" * 100_000),
        ("error_message", ValueError("x")),
        ("completion_key", "\x00"),
        ("completion_key", 5),
        ("completion_key", None),
    ]
    call: dict[str, Any] = {"run_id": "run-1", "tenant_id": "acme", "run_status": "succeeded"}
    async with running(desk.spine):
        for field, value in wrong:
            with anyio.fail_after(5), pytest.raises(TransactionFailed, match=field) as failure:
                await desk.spine.complete_run(**{**call, field: value})
            assert (failure.value.code, failure.value.phase) == ("INVALID_PARAMS", "NOT_STARTED"), (field, value)
        assert journal(desk.url, "tx.begun") == []
        assert (await desk.spine.complete_run(**call)).is_complete


async def test_a_run_starts_once_however_often_it_is_started(desk: Desk) -> None:
    """Again, and by many at once: each gets the decision it started with, one start is in the journal."""
    async with running(desk.spine):
        starts = [partial(desk.spine.start_run, "run-1", tenant_id="acme", agent_id=f"a{n}") for n in range(20)]
        decisions = await together(*starts)
        decisions.append(await desk.spine.start_run("run-1", tenant_id="acme"))
    assert all(decision == AuthorityDecision.allow() for decision in decisions)
    assert len(journal(desk.url, "run.started")) == 1


async def test_a_run_begins_once_when_many_calls_imply_it(database_url: str) -> None:
    """Twenty first calls of two processes on a run never started: one implicit start, all of them run."""
    here, there = Desk(database_url), Desk(database_url)
    async with running(here.spine, there.spine):
        results = await together(*[partial(desk.execute, run_id="run-1") for desk in (here, there)] * 10)
    assert all(sound(result).success for result in results)
    (started,) = journal(database_url, "run.started")
    assert started["implicit"] is True
    intact(database_url)


async def test_a_run_that_two_tenants_start_at_once_belongs_to_one(database_url: str) -> None:
    """From two processes: one tenant's starts are allowed, the other's are TENANT_MISMATCH, one start is recorded."""
    here, there = Desk(database_url), Desk(database_url)
    async with running(here.spine, there.spine):
        starts = [
            partial(desk.spine.start_run, "run-1", tenant_id=tenant) for tenant in ("a", "b") for desk in (here, there)
        ]
        decisions = await together(*starts * 3)
    (started,) = journal(database_url, "run.started")
    for number, decision in enumerate(decisions):
        tenant = "a" if number % 4 < 2 else "b"
        expected = "ALLOWED" if tenant == started["tenant_id"] else "TENANT_MISMATCH"
        assert decision.code == expected
    intact(database_url)


# -- another tenant's run


async def test_another_tenants_run_is_out_of_reach_and_its_story_stays_clean(sqlite_url: str) -> None:
    """TENANT_MISMATCH for operation, start, completion and report; the victim's ``why`` does not change by a letter."""
    desk = Desk(sqlite_url)
    spine = desk.spine
    async with running(spine):
        await spine.start_run("hers", tenant_id="victim")
        await desk.execute(tenant_id="victim", run_id="hers")
        before = (await spine.why("hers")).to_dict()
        entered = desk.entered

        result = sound(await desk.execute(run_id="hers"))
        assert result.error_code == "TENANT_MISMATCH"
        result = sound(await desk.execute(run_id="hers", idempotency_key="k"))
        assert result.error_code == "TENANT_MISMATCH"
        assert (await spine.start_run("hers", tenant_id="acme")).code == "TENANT_MISMATCH"
        with pytest.raises(TransactionFailed, match="another tenant") as failure:
            await spine.complete_run("hers", tenant_id="acme", run_status="succeeded")
        assert failure.value.code == "TENANT_MISMATCH"
        assert await spine.ask(CreatePolicyEvaluation("hers", "acme", "succeeded")) is None
        unknown = sound(await desk.execute("desk.steal", run_id="hers"))
        assert unknown.error_code in ("UNKNOWN_OPERATION", "TENANT_MISMATCH")

        assert (await spine.why("hers")).to_dict() == before
        assert desk.entered == entered
        done = await spine.complete_run("hers", tenant_id="victim", run_status="succeeded")
        assert done.is_complete
        assert (await desk.execute(run_id="his own", idempotency_key="k")).success
    mismatches = [b for b in journal(sqlite_url, "decision", "run.denied") if b["code"] == "TENANT_MISMATCH"]
    assert len(mismatches) >= 3
    for body in mismatches:
        assert (body["run_id"], body["claimed_run_id"], body["tenant_id"]) == (None, "hers", "acme")
    intact(sqlite_url)


async def test_a_refused_start_of_one_tenant_is_no_part_of_anothers_run(sqlite_url: str) -> None:
    """While new runs are refused anyone may have tried the id: whose run it becomes has only its own story."""
    desk = Desk(sqlite_url)
    spine = desk.spine
    async with running(spine):
        await spine.degrade(reason="an exercise", actor="ann")
        await spine.start_run("run-1", tenant_id="other")
        await desk.execute(run_id="run-1", tenant_id="other")
        await desk.execute("desk.steal", run_id="run-1", tenant_id="other")
        await spine.restore(reason="over", actor="ann")
        await spine.start_run("run-1", tenant_id="victim")
        await spine.complete_run("run-1", tenant_id="victim", run_status="failed", error_code="MINE")
        why = await spine.why("run-1")
    assert (why.tenant_id, why.verdict, why.cause.code) == ("victim", "failed", "MINE")
    assert why.decisions == []


# -- handlers


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text either")


class NotAnException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "name", "text"),
    [
        (ValueError("bad value"), "ValueError", "bad value"),
        (KeyError(), "KeyError", ""),
        (Unprintable(), "Unprintable", ""),
        (ExceptionGroup("several", [ValueError("one")]), "ExceptionGroup", "several"),
        (RuntimeError("a\x00b\ud800"), "RuntimeError", ""),
        (RuntimeError("x" * 1_000_000), "RuntimeError", "xxx"),
        (TimeoutError("its own"), "TimeoutError", "its own"),
        (asyncio.CancelledError(), "CancelledError", "CancelledError"),
        (StopIteration(), "RuntimeError", "StopIteration"),
        (NotAnException("odd"), "NotAnException", "odd"),
        (GeneratorExit(), "GeneratorExit", ""),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, BaseException) else "",
)
async def test_a_handler_that_raises_is_a_recorded_outcome(
    desk: Desk, error: BaseException, name: str, text: str
) -> None:
    """HANDLER_EXCEPTION with the type's name and its text, in result and journal; the Spine goes on."""

    @desk.spine.operation("desk.raise", timeout_s=0.5)
    async def handler(ctx: OperationContext) -> dict[str, Any]:
        raise error

    async with running(desk.spine):
        result = sound(await desk.execute("desk.raise", run_id="run-1", timeout_s=0.5))
        assert result.error_code == f"HANDLER_EXCEPTION:{name}"
        assert text in str(result.error)
        assert sound(await desk.execute()).success
        assert desk.spine.health().restarts == 0
    outcome = journal(desk.url, "outcome")[0]
    assert outcome["error_code"] == f"HANDLER_EXCEPTION:{name}"
    assert len(outcome["error"]) < 5_000
    assert query(desk.url, "SELECT count(*) FROM open_decisions") == [(0,)]
    intact(desk.url)


class Undumpable(BaseModel):
    @model_serializer
    def dump(self) -> dict[str, Any]:
        raise RuntimeError("cannot be dumped")


async def coroutine() -> dict[str, Any]:
    return {}


async def generator() -> Any:
    yield {}


@pytest.mark.parametrize(
    "value",
    [
        lambda: 5,
        lambda: "text",
        lambda: [("a", 1)],
        lambda: True,
        lambda: {1, 2},
        object,
        lambda: dict,
        AuthorityDecision.allow,
        coroutine,
        generator,
        Undumpable,
        lambda: OperationResult.fail(ValueError("an exception, not its text")),  # type: ignore[arg-type]
        lambda: OperationResult.fail("why", ValueError),  # type: ignore[arg-type]
        lambda: OperationResult.ok(["not", "a", "mapping"]),  # type: ignore[arg-type]
        lambda: OperationResult(True, {}, metadata=5),  # type: ignore[arg-type]
    ],
    ids=[
        "int",
        "str",
        "list",
        "bool",
        "set",
        "object",
        "class",
        "decision",
        "coroutine",
        "generator",
        "model",
        "error not text",
        "code not text",
        "data not a mapping",
        "metadata not a mapping",
    ],
)
async def test_a_handler_that_returns_the_wrong_type_fails_and_is_recorded(
    desk: Desk, value: Callable[[], Any]
) -> None:
    """A mapping, a model or an OperationResult made of such: anything else is a failure that says so, never a crash."""

    @desk.spine.operation("desk.wrong")
    async def handler(ctx: OperationContext) -> Any:
        return value()

    async with running(desk.spine):
        result = sound(await desk.execute("desk.wrong"))
        assert not result.success
        assert str(result.error_code).startswith("HANDLER_EXCEPTION:")
        assert desk.spine.health().restarts == 0
    (outcome,) = journal(desk.url, "outcome")
    assert outcome["error_code"] == result.error_code


@pytest.mark.parametrize(
    ("value", "data", "code"),
    [
        (None, {}, None),
        ({}, {}, None),
        ({"a": {1: 2}}, {"a": {1: 2}}, None),
        (OperationResult.ok(), None, None),
        (OperationResult.ok({"a": 1}), {"a": 1}, None),
        (OperationResult.fail("no money", "BROKE"), None, "BROKE"),
        (OperationResult(False, {"left": 1}, "no money"), {"left": 1}, "FAILED"),
    ],
)
async def test_what_a_handler_may_return(desk: Desk, value: Any, data: Any, code: str | None) -> None:
    """Nothing, a mapping, or its own result, whose failure keeps its code and data."""

    @desk.spine.operation("desk.right")
    async def handler(ctx: OperationContext) -> Any:
        return value

    async with running(desk.spine):
        result = sound(await desk.execute("desk.right"))
    assert (result.data, result.error_code) == (data, code)


async def test_a_handler_cannot_forge_the_authority_fields(desk: Desk) -> None:
    """Its own metadata is kept; what names the decision is the Spine's word."""
    forged = {"governance_active": False, "authority_code": "MINE", "decision_id": "mine", "own": 5}

    @desk.spine.operation("desk.forge")
    async def handler(ctx: OperationContext) -> OperationResult:
        return OperationResult(True, {}, metadata=forged, decision=AuthorityDecision.deny("forged"), operation="other")

    async with running(desk.spine):
        result = sound(await desk.execute("desk.forge"), "desk.forge")
    assert result.metadata["own"] == 5
    assert (result.metadata["governance_active"], result.metadata["authority_code"]) == (True, "ALLOWED")
    assert result.metadata["decision_id"] == journal(desk.url, "decision")[0]["decision_id"]
    assert result.decision == AuthorityDecision.allow()


@pytest.mark.parametrize(("declared", "asked"), [(0.1, 30), (30, 0.1)])
async def test_a_handler_that_hangs_is_cancelled_at_the_earlier_deadline(
    desk: Desk, declared: float, asked: float
) -> None:
    """TIMEOUT, of the operation or of the call, whichever is first; the outcome says it may have taken effect."""
    cancelled = asyncio.Event()

    @desk.spine.operation("desk.hang", timeout_s=declared)
    async def hang(ctx: OperationContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with running(desk.spine):
        with anyio.fail_after(5):
            result = sound(await desk.execute("desk.hang", timeout_s=asked))
        assert result.error_code == "TIMEOUT"
        assert "0.1 s" in str(result.error)
        assert cancelled.is_set()
    (outcome,) = journal(desk.url, "outcome")
    assert outcome["error_code"] == "TIMEOUT"
    assert outcome["handle_us"] >= 90_000


async def test_what_is_late_before_it_starts_does_not_start(desk: Desk) -> None:
    """A call whose deadline passed while it waited is a recorded TIMEOUT and its handler never runs."""
    async with running(desk.spine), anyio.create_task_group() as group:
        group.start_soon(partial(desk.execute, "desk.single"))
        await until(lambda: desk.entered == 1)
        result = sound(await desk.execute("desk.single", timeout_s=0.1))
        assert result.error_code == "TIMEOUT"
        tiny = sound(await desk.execute(timeout_s=1e-9))
        assert tiny.error_code == "TIMEOUT"
        desk.leave.set()
    assert desk.entered == 1
    late = [body for body in journal(desk.url, "decision") if body["code"] == "TIMEOUT"]
    assert len(late) == 2
    assert all(body["final"] for body in late)


async def test_a_handler_that_swallows_its_cancellation_keeps_its_slot_and_not_its_caller(desk: Desk) -> None:
    """The caller is answered, the outcome recorded once; the slot is free when the handler really ends."""
    leave = asyncio.Event()

    @desk.spine.operation("desk.stubborn", timeout_s=0.1, concurrency=1)
    async def stubborn(ctx: OperationContext) -> dict[str, Any]:
        while not leave.is_set():
            try:
                await leave.wait()
            except asyncio.CancelledError:
                continue
        return {}

    async with running(desk.spine):
        with anyio.fail_after(5):
            result = sound(await desk.execute("desk.stubborn", run_id="run-1"))
        assert result.error_code == "TIMEOUT"
        assert "swallowed" in str(result.error)
        assert desk.spine.health().decisions["stuck"] == 1
        assert sound(await desk.execute("desk.stubborn")).error_code == "TIMEOUT"
        assert sound(await desk.execute()).success
        leave.set()
        await until(lambda: desk.spine._system.exchange.credits_in_use == 0)
        assert (await desk.execute("desk.stubborn")).success
    outcomes = [body for body in journal(desk.url, "outcome") if body["run_id"] == "run-1"]
    assert [body["error_code"] for body in outcomes] == ["TIMEOUT"]
    intact(desk.url)


@pytest.mark.parametrize("who", ["operation desk.block", "rule sleepy"])
async def test_what_blocks_the_loop_is_named_with_its_stack(sqlite_url: str, who: str) -> None:
    """``health().blocked`` tells which operation or rule held the loop, for how long, and where it stood."""
    desk = Desk(sqlite_url, blocked_s=0.1)

    def hold() -> None:
        time.sleep(0.7)

    @desk.spine.operation("desk.block")
    async def block(ctx: OperationContext) -> dict[str, Any]:
        if who.startswith("operation"):
            hold()
        return {}

    @desk.spine.rule("desk.block", id="sleepy")
    def sleepy(ctx: OperationContext) -> AuthorityDecision:
        if who.startswith("rule"):
            hold()
        return AuthorityDecision.allow()

    async with running(desk.spine):
        assert desk.spine.health().blocked == ()
        assert (await desk.execute("desk.block")).success
        await until(lambda: desk.spine.health().blocked)
        report = desk.spine.health().blocked[0]
    assert report["culprit"] == who
    assert "in hold" in report["stack"]
    assert 0.1 <= report["seconds"] < 5


# -- synchronous handlers


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


@pytest.mark.parametrize("end", ["returned", "timed out"])
async def test_nothing_is_executed_for_a_handler_that_has_ended(desk: Desk, end: str) -> None:
    """Once its outcome is recorded, neither a context kept for later nor a call not yet awaited runs anything."""
    kept: list[Any] = []

    @desk.spine.operation("desk.keeper", timeout_s=0.1)
    async def keeper(ctx: OperationContext) -> None:
        kept.extend((ctx.execute, ctx.execute("desk.quick")))
        while end == "timed out" and not desk.leave.is_set():
            try:
                await desk.leave.wait()
            except asyncio.CancelledError:
                continue

    async with running(desk.spine):
        assert sound(await desk.execute("desk.keeper", run_id="run-1")).success is (end == "returned")
        execute, pending = kept
        for late in (pending, execute("desk.quick")):
            with pytest.raises(ConfigurationError, match=r"'desk\.keeper' after its end"):
                await late
        desk.leave.set()
    assert desk.entered == 0
    assert [body["operation"] for body in journal(desk.url, "decision")] == ["desk.keeper"]


async def test_a_synchronous_handler_that_hangs_is_answered_for_and_its_thread_abandoned(desk: Desk) -> None:
    """Threads cannot be cancelled: the caller gets TIMEOUT all the same."""
    leave = threading.Event()

    @desk.spine.operation("desk.hang", timeout_s=0.1)
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


# -- the publisher


class ForRun(Published):
    """Fails for the first event of one run, until told otherwise; it would take those behind it."""

    def __init__(self, run_id: str, *, hang: bool = False) -> None:
        super().__init__()
        self.run_id = run_id
        self.hang = hang
        self.stuck = ""
        self.mended = asyncio.Event()

    async def publish(self, event: Event) -> None:
        if event.run_id == self.run_id and self.stuck in ("", event.event_id) and not self.mended.is_set():
            self.stuck = event.event_id
            if not self.hang:
                raise ConnectionError("the broker is away")
            await self.mended.wait()
        await super().publish(event)


def published(desk: Desk) -> list[tuple[str, str]]:
    assert isinstance(desk.spine._publisher, Published)
    return [(event.run_id, event.tx_id) for event in desk.spine._publisher.events]


async def complete(desk: Desk, run_id: str, key: str = "") -> Any:
    return await desk.spine.complete_run(run_id, tenant_id="acme", run_status="succeeded", completion_key=key)


@pytest.mark.parametrize("hang", [False, True], ids=["raises", "hangs"])
async def test_a_publisher_that_fails_keeps_nobody_and_gets_its_events_later_in_order(
    sqlite_url: str, hang: bool
) -> None:
    """The completion is committed and returned without it; other runs' events pass; this run's come later, in order."""
    publisher = ForRun("run-1", hang=hang)
    desk = Desk(sqlite_url, publisher)
    async with running(desk.spine):
        with anyio.fail_after(10):
            first = await complete(desk, "run-1", "a")
            other = await complete(desk, "run-2")
            second = await complete(desk, "run-1", "b")
        assert [done.phase for done in (first, other, second)] == ["COMMITTED", "EVENTS_PUBLISHED", "COMMITTED"]
        assert first.is_complete
        assert first.events_published == []
        assert published(desk) == [("run-2", other.transaction_id)]
        assert [event["published"] for event in (await desk.spine.why("run-1")).events] == [False, False]
        publisher.mended.set()
        await until(lambda: len(journal(sqlite_url, "event.published")) == 3)
        assert published(desk)[1:] == [("run-1", first.transaction_id), ("run-1", second.transaction_id)]
        again = await complete(desk, "run-1", "a")
        assert (again.phase, again.events_published) == ("EVENTS_PUBLISHED", ["run.completed"])
    intact(sqlite_url)


async def test_events_that_were_not_delivered_are_delivered_by_the_next_process(sqlite_url: str) -> None:
    """Pending events are in the journal: whoever starts next delivers them, in order, under the same ids."""
    broken = Desk(sqlite_url, ForRun("run-1"))
    async with running(broken.spine):
        for key in ("a", "b"):
            await complete(broken, "run-1", key)
    assert journal(sqlite_url, "event.published") == []
    mended = Desk(sqlite_url)
    async with running(mended.spine):
        await until(lambda: len(published(mended)) == 2)
        await until(lambda: query(sqlite_url, "SELECT count(*) FROM outbox WHERE state = 'pending'") == [(0,)])
    assert isinstance(mended.spine._publisher, Published)
    delivered = [event.event_id for event in mended.spine._publisher.events]
    assert delivered == [body["event_id"] for body in journal(sqlite_url, "event")]
    intact(sqlite_url)


async def test_a_publisher_that_hangs_does_not_hold_the_stop(sqlite_url: str) -> None:
    """Its event stays pending in the journal."""
    desk = Desk(sqlite_url, ForRun("run-1", hang=True))
    async with running(desk.spine):
        await complete(desk, "run-1")
        with anyio.fail_after(5):
            receipts = await desk.spine.stop()
    assert {receipt.end for receipt in receipts} == {"clean"}
    assert query(sqlite_url, "SELECT state FROM outbox") == [("pending",)]


@pytest.mark.parametrize("publisher", [5, object(), "log", Published], ids=repr)
def test_what_cannot_publish_is_refused_as_publisher(sqlite_url: str, publisher: Any) -> None:
    """Where it is given, not at the first event."""
    with pytest.raises(TypeError, match="publisher"):
        Spine(sqlite_url, publisher=publisher)


# -- callers that go away


async def test_a_caller_cancelled_before_the_start_keeps_it_from_starting(desk: Desk) -> None:
    """It waited for a slot: when that comes, the call is recorded as CANCELLED and its handler does not run."""
    async with running(desk.spine), anyio.create_task_group() as group:
        group.start_soon(partial(desk.execute, "desk.single"))
        await until(lambda: desk.entered == 1)
        caller = asyncio.create_task(desk.execute("desk.single", run_id="run-1", idempotency_key="k"))
        while not (await desk.spine.status())["operations"]["desk.single"]["waiting"]:
            await anyio.lowlevel.checkpoint()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        desk.leave.set()
        await until(lambda: any(body["code"] == "CANCELLED" for body in journal(desk.url, "decision")))
        assert desk.entered == 1
        # What was cancelled has not used its key up.
        assert sound(await desk.execute("desk.single", run_id="run-1", idempotency_key="k")).success
    cancelled = [body for body in journal(desk.url, "decision") if body["code"] == "CANCELLED"]
    assert [(body["run_id"], body["final"], body["key"]) for body in cancelled] == [("run-1", True, None)]
    assert len(journal(desk.url, "outcome")) == 2


async def test_a_caller_cancelled_after_the_start_does_not_stop_it(desk: Desk) -> None:
    """Started work finishes and is recorded, whoever still listens."""
    async with running(desk.spine):
        with anyio.move_on_after(0.2) as scope:
            await desk.execute("desk.slow", run_id="run-1")
        assert scope.cancelled_caught
        assert (desk.entered, desk.left) == (1, 0)
        desk.leave.set()
        await until(lambda: journal(desk.url, "outcome"))
    assert desk.left == 1
    (outcome,) = journal(desk.url, "outcome")
    assert outcome["success"]


async def test_a_completion_whose_caller_is_cancelled_is_all_or_nothing_and_known_afterwards(desk: Desk) -> None:
    """Cancelled at any moment: completing again gives one committed transaction."""
    async with running(desk.spine):
        for number in range(20):
            caller = asyncio.create_task(complete(desk, f"run-{number}"))
            for _ in range(number):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.wait([caller])
        for number in range(20):
            assert (await complete(desk, f"run-{number}")).is_complete
    assert len(journal(desk.url, "tx.committed")) == 20
    intact(desk.url)


# -- the bounded mailbox


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


async def test_waiting_callers_that_give_up_leave_no_credit_behind(sqlite_url: str) -> None:
    """Cancelled in the queue for a credit, in every moment of its hand-over: all credits come back."""
    desk = Desk(sqlite_url, credits=3)
    async with running(desk.spine):
        for yields in range(12):
            desk.leave.clear()
            entered = desk.entered
            holders = [asyncio.create_task(desk.execute("desk.slow")) for _ in range(3)]
            await until(lambda entered=entered: desk.entered == entered + 3)
            waiters = [asyncio.create_task(desk.execute(wait=True)) for _ in range(3)]
            await asyncio.sleep(0)
            desk.leave.set()
            for _ in range(yields):
                await asyncio.sleep(0)
            for waiter in waiters[:2]:
                waiter.cancel()
            await asyncio.wait([*holders, *waiters[:2]])
            assert sound(await waiters[2]).success
            await until(lambda: desk.credits_in_use == 0)


# -- nested calls


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


async def test_a_nested_call_has_only_the_time_that_is_left(desk: Desk) -> None:
    """Deadlines are inherited: a slow nested call ends with its caller's budget, not its own."""

    @desk.spine.operation("desk.outer", timeout_s=0.3)
    async def outer(ctx: OperationContext) -> OperationResult:
        return await ctx.execute("desk.slow")

    async with running(desk.spine):
        with anyio.fail_after(5):
            result = sound(await desk.execute("desk.outer", run_id="run-1"))
        assert result.error_code == "TIMEOUT"
        await until(lambda: len(journal(desk.url, "outcome")) == 2)
    assert {body["error_code"] for body in journal(desk.url, "outcome")} == {"TIMEOUT"}


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


# -- limits and durability


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


async def test_a_buffered_operation_says_that_it_is_not_durable_yet(desk: Desk) -> None:
    """Its allowed calls do not wait for the commit; what must never be lost - a denial, a new run - still does."""

    @desk.spine.rule("desk.buffered")
    def limit(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("no") if ctx.params.get("deny") else AuthorityDecision.allow()

    @desk.spine.operation("desk.buffered", durability="buffered")
    async def buffered(ctx: OperationContext) -> dict[str, Any]:
        return {}

    async with running(desk.spine):
        assert (await desk.execute("desk.buffered", run_id="run-1")).success
        assert [body["run_id"] for body in journal(desk.url, "run.started")] == ["run-1"]
        denied = sound(await desk.execute("desk.buffered", run_id="run-1", params={"deny": True}))
        assert (denied.error_code, denied.durable) == ("DENIED", True)
        results = [sound(await desk.execute("desk.buffered", run_id="run-1")) for _ in range(100)]
        assert {(result.success, result.durable) for result in results} == {(True, False)}
        await desk.spine.flush()
        assert len(journal(desk.url, "outcome")) == 101
        assert sound(await desk.execute(run_id="run-1")).durable
        await desk.execute("desk.buffered", run_id="run-1")
    assert len(journal(desk.url, "outcome")) == 103, "the stop makes everything durable"
    intact(desk.url)


# -- stopping under load


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
