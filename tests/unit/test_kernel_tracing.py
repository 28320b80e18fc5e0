"""The message flow in logs: static names, the same keys, one run's order from its log alone, free when off."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from spine import OperationContext, Spine
from spine.kernel.errors import ConfigurationError
from spine.kernel.messages import Request
from spine.kernel.supervisor import Policy
from spine.kernel.tracing import LEVELS, Tracer
from spine.settings import Settings
from tests.unit.kernel_rig import close_exchanges, ends, exchange, kernel, stop, until

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(45, method="thread")]

IDENTITY = {"trace_id", "msg_id", "correlation_id", "causation_id", "run_id", "seq", "actor", "sender"}


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    close_exchanges()


def messages(logs: list[Any], name: str) -> list[Any]:
    return [line for line in logs if line["event"] == f"spine.message.{name}"]


async def test_every_hop_of_a_message_is_told_under_a_static_name_with_the_same_keys() -> None:
    async with kernel(level="messages") as built:
        with capture_logs() as logs:
            assert await ends([built.ask("reply", "x")]) == ["x"]
        assert [(line["event"], line["actor"]) for line in logs] == [
            ("spine.message.enqueued", "router"),
            ("spine.message.received", "router"),
            ("spine.message.received", "worker"),
            ("spine.message.handled", "worker"),
        ]
        for line in logs:
            assert set(line) >= IDENTITY, line
            assert line["msg_id"] == logs[0]["msg_id"]
            assert line["sender"] == "caller"
        assert all("mailbox_depth" in line for line in logs[:3])
        assert all(line["queue_ms"] >= 0 for line in logs[1:3])
        assert logs[3]["handle_ms"] >= 0
        assert all(line["seq"] >= 1 for line in logs[1:])


async def test_every_way_to_end_has_its_event() -> None:
    policy = Policy(intensity=10, backoff_first_s=0.001)
    async with kernel(level="messages", policy=policy) as built:
        with capture_logs() as logs:
            await ends([built.ask("fail", "no")])
            await ends([built.ask("silence", timeout_s=0.02)])
            await ends([built.ask("twice")])
            await ends([built.ask(to="nobody")])
            cancelled = built.ask("silence")
            await until(lambda: len(built.newest().handled) == 4)
            cancelled.cancel()
            await ends([cancelled])
            await ends([built.ask("crash", "boom")])
            await built.restarted(1)
        (failed, *_), (expired,) = messages(logs, "failed"), messages(logs, "expired")
        assert (failed["error_type"], failed["error"]) == ("ValueError", "no")
        assert expired["message"] == "Say"
        assert len(messages(logs, "late")) == 1
        assert len(messages(logs, "cancelled")) == 1
        assert "nobody" in messages(logs, "dead_lettered")[0]["error"]
        for line in logs:
            if line["event"].startswith("spine.message."):
                assert set(line) >= IDENTITY, line
        (crashed,) = [line for line in logs if line["event"] == "spine.actor.crashed"]
        assert crashed["actor"] == "worker"
        assert "boom" in crashed["error"]
        assert crashed["restart"] == 1


async def test_the_life_of_an_actor_is_told() -> None:
    policy = Policy(intensity=10, backoff_first_s=0.001)
    with capture_logs() as logs:
        async with kernel(level="decisions", policy=policy) as built:
            await ends([built.ask("crash")])
            await built.restarted(1)
            await stop(built)
    told = [(line["event"], line["actor"]) for line in logs if line["event"].startswith("spine.actor")]
    assert told == [
        ("spine.actor.started", "router"),
        ("spine.actor.started", "worker"),
        ("spine.actor.crashed", "worker"),
        ("spine.actor.restarting", "worker"),
        ("spine.actor.started", "worker"),
        ("spine.actor.stopped", "worker"),
        ("spine.actor.stopped", "router"),
    ]


class Watched(Request[str]):
    """Knows whether anybody looked at what it is about."""

    looked = 0
    how, text = "reply", "seen"

    @property
    def run_id(self) -> str:
        type(self).looked += 1
        return "run-1"


@pytest.mark.parametrize("level", ["off", "decisions"])
async def test_messages_cost_nothing_unless_they_are_asked_for(level: Any) -> None:
    """No event, and nothing of what an event would hold is even put together."""
    Watched.looked = 0
    async with kernel(level=level) as built:
        with capture_logs() as logs:
            for _ in range(50):
                assert await built.exchange.ask(Watched(), "worker", timeout_s=5) == "seen"
        assert logs == []
        assert Watched.looked == 0
        built.exchange.tracer.level = "messages"
        assert await built.exchange.ask(Watched(), "worker", timeout_s=5) == "seen"
        assert Watched.looked > 0


async def test_faults_are_told_at_every_level() -> None:
    for level in LEVELS:
        async with kernel(level=level, policy=Policy(intensity=10, backoff_first_s=0.001)) as built:
            with capture_logs() as logs:
                await ends([built.ask("crash", "boom")])
            (crashed,) = [line for line in logs if line["event"] == "spine.actor.crashed"]
            assert crashed["log_level"] == "error"


async def test_the_level_can_be_changed_while_running_and_only_to_one_that_exists() -> None:
    tracer = Tracer("b" * 16)
    assert (tracer.decisions, tracer.messages) == (False, False)
    tracer.level = "messages"
    assert (tracer.decisions, tracer.messages) == (True, True)
    with pytest.raises(ConfigurationError, match=r"trace level 'loud' is unknown: use one of off, decisions, messages"):
        tracer.level = "loud"  # type: ignore[assignment]
    assert tracer.level == "messages"


async def test_message_and_trace_ids_are_unique_across_processes_and_of_w3c_shape() -> None:
    one, other = exchange(), Tracer("c" * 16)
    sent = one.post(Watched(), "worker", timeout_s=1)
    told = one.tracer.identity(sent)
    assert len(told["trace_id"]) == 32
    assert int(told["trace_id"], 16)
    assert told["msg_id"] != other.msg_id(sent.number)


async def test_a_log_that_cannot_be_written_crashes_no_actor() -> None:
    class Closed:
        def msg(self, *_: object, **__: object) -> None:
            raise BrokenPipeError("the reader is gone")

        info = error = msg

    structlog.configure(logger_factory=lambda *_: Closed(), wrapper_class=structlog.BoundLogger)
    async with kernel(level="messages") as built:
        assert await ends([built.ask()]) == ["done"]
        assert built.supervisor.crashes == []
        assert built.exchange.tracer.lost > 0


# -- a whole Spine


def flow(spine: Spine) -> None:
    @spine.operation("orders.place")
    async def place(ctx: OperationContext) -> dict[str, Any]:
        structlog.get_logger("app").info("app.placing")
        await ctx.execute("stock.reserve", {"n": 1})
        await ctx.execute("stock.reserve", {"n": 2})
        return {}

    @spine.operation("stock.reserve")
    async def reserve(ctx: OperationContext) -> dict[str, Any]:
        return {}


async def one_day(url: str, level: Any) -> list[dict[str, Any]]:
    """Two runs side by side, logged as JSON the way an application would."""
    lines: list[str] = []

    class Out:
        def msg(self, line: str) -> None:
            lines.append(line)

        info = error = warning = msg

    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.JSONRenderer(sort_keys=True)],
        logger_factory=lambda *_: Out(),
        wrapper_class=structlog.BoundLogger,
        cache_logger_on_first_use=False,
    )
    spine = Spine(url, settings=Settings(trace=level))
    flow(spine)
    async with spine:
        for run in ("run-1", "run-2"):
            await spine.start_run(run, tenant_id="acme")
        for _ in range(2):
            for run in ("run-1", "run-2"):
                assert (await spine.execute("orders.place", tenant_id="acme", run_id=run)).success
        assert not (await spine.execute("no.such", tenant_id="acme", run_id="run-1")).success
        for run in ("run-1", "run-2"):
            await spine.complete_run(run, tenant_id="acme", run_status="succeeded")
    return [json.loads(line) for line in lines]


def depth_first(lines: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The order of one run's messages, from caller to reply, put together from nothing but its own log lines."""
    steps = ["spine.message.enqueued", "spine.message.received", "spine.message.handled", "spine.message.failed"]
    places: dict[str, int] = {}
    causes: dict[str, str | None] = {}
    events: dict[str, list[tuple[int, str, str]]] = {}
    for line in lines:
        if line["event"] in steps:
            msg = line["msg_id"]
            places[msg] = max(places.get(msg, 0), line["seq"] or 0)
            causes[msg] = line["causation_id"]
            rank = steps.index(line["event"]) * 2 + (line["actor"] != "router")
            events.setdefault(msg, []).append((rank, line["event"], line["actor"]))

    def told(msg: str) -> list[tuple[str, str, str]]:
        own = [(event, actor, msg) for _, event, actor in sorted(events[msg])]
        children = sorted((child for child, cause in causes.items() if cause == msg), key=places.__getitem__)
        return [*own[:-1], *(step for child in children for step in told(child)), own[-1]]

    roots = sorted((msg for msg, cause in causes.items() if cause not in causes), key=places.__getitem__)
    return [step for root in roots for step in told(root)]


async def test_from_the_log_of_one_run_alone_its_messages_can_be_put_in_order_from_caller_to_reply(
    sqlite_url: str,
) -> None:
    """The lines of one run, shuffled: causes and stamps give back the order in which they were written."""
    everything = await one_day(sqlite_url, "messages")
    mine = [line for line in everything if line.get("run_id") == "run-1"]
    callers = {line["msg_id"] for line in mine if line.get("sender") == "caller"}
    traces = {line["trace_id"] for line in mine if line.get("msg_id") in callers}
    mine = [line for line in mine if line.get("trace_id") in traces]
    written = [
        (line["event"], line["actor"], line["msg_id"]) for line in mine if line["event"].startswith("spine.message.")
    ]
    shuffled = mine.copy()
    random.Random(7).shuffle(shuffled)
    assert depth_first(shuffled) == written
    assert len(callers) == 5
    # Each call: in by the caller, out by its reply.
    for caller in callers:
        steps = [event for event, _, msg in written if msg == caller]
        assert steps[0] == "spine.message.enqueued"
        assert steps[-1] == "spine.message.handled"
        assert steps.count("spine.message.received") == 2
    # Three operations a call: a decision and an outcome each, sent to the audit actor.
    placed = next(line["msg_id"] for line in mine if line.get("operation") == "orders.place")
    trace = next(line["trace_id"] for line in mine if line.get("msg_id") == placed)
    assert sum(line["event"] == "spine.decision" for line in mine if line["trace_id"] == trace) == 3
    assert sum(line["event"] == "spine.outcome" for line in mine if line["trace_id"] == trace) == 3
    assert not [line for line in mine if line.get("run_id") != "run-1"]


async def test_what_a_handler_logs_carries_its_message_and_its_run(sqlite_url: str) -> None:
    """Identity travels in the envelope; a handler sees it bound in structlog's contextvars while it runs."""
    lines = await one_day(sqlite_url, "messages")
    said = [line for line in lines if line["event"] == "app.placing"]
    assert [line["run_id"] for line in said] == ["run-1", "run-2"] * 2
    for line in said:
        call = next(other for other in lines if other.get("msg_id") == line["msg_id"])
        assert call["trace_id"] == line["trace_id"]
        assert call["message"] == "Execute"
        assert line["operation"] == "orders.place"
    assert structlog.contextvars.get_contextvars() == {}


async def test_decisions_and_transaction_phases_are_told_without_the_messages(sqlite_url: str) -> None:
    lines = await one_day(sqlite_url, "decisions")
    names = [line["event"] for line in lines]
    assert not [name for name in names if name.startswith("spine.message.")]
    assert names.count("spine.decision") == 15
    assert names.count("spine.outcome") == 12
    assert names.count("spine.transaction.committed") == 2
    for line in lines:
        if line["event"] in ("spine.decision", "spine.outcome", "spine.transaction.committed"):
            assert set(line) >= {"governance_active", "authority_degraded", "authority_reason", "authority_code"}
            assert set(line) >= IDENTITY
            assert line["run_id"] in ("run-1", "run-2")
    denied = next(line for line in lines if line["event"] == "spine.decision" and not line["allowed"])
    assert denied["authority_code"] == "UNKNOWN_OPERATION"


async def test_every_way_a_start_is_decided_and_every_switch_are_told(sqlite_url: str) -> None:
    """A start allowed, refused or of another tenant's run, and who switched what: with their message's identity."""
    spine = Spine(sqlite_url, settings=Settings(trace="decisions"))
    async with spine:
        with capture_logs() as lines:
            await spine.start_run("run-1", tenant_id="acme")
            await spine.start_run("run-1", tenant_id="other")
            await spine.start_run("run-1", tenant_id="")
            await spine.degrade(reason="an exercise", actor="ann")
            await spine.start_run("run-2", tenant_id="acme")
    starts = [line for line in lines if line["event"] == "spine.decision"]
    assert [(line["run_id"], line["tenant_id"], line["allowed"], line["code"]) for line in starts] == [
        ("run-1", "acme", True, "ALLOWED"),
        ("run-1", "other", False, "TENANT_MISMATCH"),
        ("run-1", None, False, "INVALID_PARAMS"),
        ("run-2", "acme", False, "DEGRADED_NEW_RUN"),
    ]
    (changed,) = [line for line in lines if line["event"] == "spine.governance.changed"]
    assert (changed["was"], changed["now"], changed["epoch"]) == ("active", "degraded", 2)
    assert (changed["by"], changed["reason"], changed["actor"]) == ("ann", "an exercise", "registry")
    for line in [*starts, changed]:
        assert set(line) >= IDENTITY
        assert line["msg_id"] and line["trace_id"] and line["seq"]
    for line in starts:
        assert set(line) >= {"governance_active", "authority_degraded", "authority_reason", "authority_code"}
        assert line["operation"] == "run.start"


async def test_a_quiet_day_at_level_off_leaves_no_line_of_spine(sqlite_url: str) -> None:
    lines = await one_day(sqlite_url, "off")
    assert {line["event"] for line in lines} <= {"app.placing", "spine.event"}


async def test_the_library_never_configures_structlog(sqlite_url: str) -> None:
    assert not structlog.is_configured()
    spine = Spine(sqlite_url, settings=Settings(trace="off"))
    flow(spine)
    async with spine:
        await spine.execute("stock.reserve", tenant_id="acme")
    assert not structlog.is_configured()
