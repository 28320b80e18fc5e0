"""Law 1: no operation runs, no run completes, no state changes except through the spine mailbox.

The journal's order is the mailbox's order per run.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from compat.run_governance_facade import get_run_governance_facade
from compat.transaction_coordinator import get_transaction_coordinator
from spine import OperationContext, OperationResult, Spine
from spine.governance.facade import CreatePolicyEvaluation
from spine.kernel.clock import VirtualClock
from spine.kernel.supervisor import Policy
from spine.settings import Settings
from tests.laws.world import START_US, assert_intact, at_rest, ended, found, kill, rows, size, until

pytestmark = pytest.mark.anyio


async def test_while_nobody_serves_the_spine_mailbox_nothing_runs_nothing_completes_and_nothing_changes(
    sqlite_url: str,
) -> None:
    """The router is down: every way in waits, a handler that runs already cannot even record its end.

    When the router is back all of it happens, and nothing of it happened twice or before.
    """
    clock = VirtualClock(START_US)
    policy = Policy(backoff_first_s=5, backoff_most_s=5)
    spine = Spine(sqlite_url, settings=Settings(clock=clock, supervision=policy))
    ran: list[str] = []
    held = asyncio.Event()

    @spine.operation("work.plain")
    async def plain(ctx: OperationContext) -> None:
        ran.append("plain")

    @spine.operation("work.buffered", durability="buffered")
    async def buffered(ctx: OperationContext) -> None:
        ran.append("buffered")

    @spine.operation("work.threaded")
    def threaded(ctx: OperationContext) -> None:
        ran.append("threaded")

    @spine.operation("work.held")
    async def hold(ctx: OperationContext) -> None:
        ran.append("held")
        await held.wait()
        ran.append("released")
        await ctx.execute("work.plain")
        ran.append("after the nested call")

    async with spine:
        await spine.start_run("run-1", tenant_id="acme")
        running = asyncio.ensure_future(spine.execute("work.held", tenant_id="acme", run_id="run-1"))
        await until(lambda: ran == ["held"])
        await kill(spine, "router")
        before, state = size(sqlite_url), spine.health().governance
        calls = [
            *[
                asyncio.ensure_future(spine.execute(f"work.{name}", tenant_id="acme", run_id="run-1"))
                for name in ("plain", "buffered", "threaded")
            ],
            asyncio.ensure_future(spine.start_run("run-2", tenant_id="acme")),
            asyncio.ensure_future(spine.complete_run("run-3", tenant_id="acme", run_status="succeeded")),
            asyncio.ensure_future(spine.ask(CreatePolicyEvaluation("run-1", "acme", "succeeded"))),
            asyncio.ensure_future(spine.degrade(reason="a test", actor="law 1")),
        ]
        held.set()
        await until(lambda: "released" in ran)
        await at_rest(spine)
        assert ran == ["held", "released"]
        assert size(sqlite_url) == before
        assert spine.health().governance == state
        assert not [call for call in (running, *calls) if call.done()]
        assert spine.health().mailboxes["router"] >= len(calls) + 1

        await clock.advance(8)
        results = await ended([running, *calls])
        assert not [result for result in results if isinstance(result, BaseException)], results
        assert all(result.success for result in results[:4])
        assert sorted(ran[2:]) == sorted(["plain", "plain", "buffered", "threaded", "after the nested call"])
        await spine.flush()
        assert len(found(sqlite_url, "outcome", run_id="run-1")) == 5
        assert len(found(sqlite_url, "tx.committed", run_id="run-3")) == 1
        assert [row["to"] for row in found(sqlite_url, "governance.changed")] == ["degraded"]
    assert_intact(sqlite_url)


async def test_every_message_that_an_actor_is_handed_has_passed_the_spine_mailbox(sqlite_url: str) -> None:
    """Operations, nested ones, runs, completions, switches, records and the legacy worker's calls: one way in.

    Told by the black boxes: what an actor's ring remembers, the router's ring remembers as well, and every unit in
    the journal came in a message.
    """
    spine = Spine(sqlite_url)

    @spine.operation("work.outer")
    async def outer(ctx: OperationContext) -> OperationResult:
        return await ctx.execute("work.inner")

    @spine.operation("work.inner")
    async def inner(ctx: OperationContext) -> None:
        pass

    def worker() -> None:
        get_run_governance_facade().create_policy_evaluation("run-2", "acme", "succeeded")
        get_transaction_coordinator().execute("run-2", "acme", "succeeded")

    async with spine:
        await spine.start_run("run-1", tenant_id="acme")
        assert (await spine.execute("work.outer", tenant_id="acme", run_id="run-1")).success
        assert (await spine.execute("no.such", tenant_id="acme")).error_code == "UNKNOWN_OPERATION"
        await spine.degrade(reason="a test", actor="law 1")
        await spine.restore(reason="a test", actor="law 1")
        await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        await anyio.to_thread.run_sync(worker)
        boxes = {name: mailbox.passages() for name, mailbox in spine._system.exchange.mailboxes.items()}
        passed = {passage.number for passage in boxes.pop("router")}
        for name, passages in boxes.items():
            assert {passage.number for passage in passages} <= passed, name
        kinds = {name: {passage.kind for passage in passages} for name, passages in boxes.items()}
        assert kinds["registry"] == {"Execute", "StartRun", "SwitchGovernance"}
        assert kinds["coordinator"] == {"CompleteRun", "CreatePolicyEvaluation"}
        assert kinds["audit"] == {"Append", "KeepLease"}
        appended = sum(passage.kind == "Append" for passage in boxes["audit"])
        assert appended == len({row["unit"] for row in rows(sqlite_url)}) == spine.health().journal["units"]


async def test_the_journal_has_each_run_in_the_order_of_the_spine_mailbox(sqlite_url: str) -> None:
    """Many callers, many runs, at once: per run the decisions stand in the order in which the router stamped the calls,
    and all records in the order in which it stamped them."""
    spine = Spine(sqlite_url, settings=Settings(trace="messages"))

    @spine.operation("work.quick")
    async def quick(ctx: OperationContext) -> None:
        pass

    @spine.operation("work.slow")
    async def slow(ctx: OperationContext) -> None:
        for _ in range(ctx.params["turns"]):
            await asyncio.sleep(0)

    @spine.operation("work.nested")
    async def nested(ctx: OperationContext) -> OperationResult:
        return await ctx.execute("work.slow", {"turns": 3})

    async def caller(number: int) -> None:
        for turn in range(5):
            name = ("work.quick", "work.slow", "work.nested")[(number + turn) % 3]
            run = f"run-{(number * 7 + turn) % 5}"
            params = {"turns": number % 6}
            assert (await spine.execute(name, tenant_id="acme", run_id=run, params=params)).success

    with capture_logs() as logs:
        async with spine:
            for number in range(5):
                await spine.start_run(f"run-{number}", tenant_id="acme")
            async with anyio.create_task_group() as group:
                for number in range(30):
                    group.start_soon(caller, number)
    decided = {
        line["msg_id"]: line["decision_id"]
        for line in logs
        if line["event"] == "spine.decision" and line["operation"] != "run.start"
    }
    stamped = sorted(
        (line for line in logs if line["event"] == "spine.message.received" and line["actor"] == "audit"),
        key=lambda line: line["seq"],
    )
    calls = sorted(
        (line for line in logs if line["event"] == "spine.message.received" and line["actor"] == "registry"),
        key=lambda line: line["seq"],
    )
    assert len(decided) == 200
    for run in (f"run-{number}" for number in range(5)):
        journaled = [
            (row["kind"], row["decision_id"])
            for row in rows(sqlite_url)
            if row.get("run_id") == run and "decision_id" in row
        ]
        seen: set[str] = set()
        sent = []
        for line in stamped:
            if line["run_id"] == run and line["causation_id"] in decided:
                decision = decided[line["causation_id"]]
                sent.append(("outcome" if decision in seen else "decision", decision))
                seen.add(decision)
        assert len(sent) >= 40
        assert journaled == sent
        asked = [decided[line["msg_id"]] for line in calls if line["run_id"] == run and line["msg_id"] in decided]
        assert [decision for kind, decision in journaled if kind == "decision"] == asked


async def test_what_was_buffered_before_a_completion_stands_before_it_in_the_journal(sqlite_url: str) -> None:
    """A buffered operation does not wait for its commit; its run's completion, asked for later, comes later."""
    spine = Spine(sqlite_url)

    @spine.operation("work.buffered", durability="buffered")
    async def buffered(ctx: OperationContext) -> None:
        pass

    async with spine:
        await spine.start_run("run-1", tenant_id="acme")
        for _ in range(3):
            result = await spine.execute("work.buffered", tenant_id="acme", run_id="run-1")
            assert result.success
            assert not result.durable
        await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        await spine.flush()
        kinds = [row["kind"] for row in rows(sqlite_url) if row.get("run_id") == "run-1"]
    assert kinds[:2] == ["run.started", "ack"]
    assert kinds[2:8] == ["decision", "outcome"] * 3
    assert kinds[8] == "tx.begun"


async def test_two_spines_on_one_database_make_one_order(sqlite_url: str) -> None:
    """Each writes through its own audit actor; the rows are one chain, each run's in its caller's order."""
    spines = [Spine(sqlite_url) for _ in range(2)]
    for spine in spines:

        @spine.operation("work.step")
        async def step(ctx: OperationContext) -> None:
            pass

    async def caller(spine: Spine, run: str) -> list[Any]:
        made = []
        for _ in range(6):
            result = await spine.execute("work.step", tenant_id="acme", run_id=run)
            made.append(result.metadata["decision_id"])
        await spine.complete_run(run, tenant_id="acme", run_status="succeeded")
        return made

    async with spines[0], spines[1]:
        runs = [(spine, f"run-{number}-{n}") for n, spine in enumerate(spines) for number in range(8)]
        told = await asyncio.gather(*[caller(spine, run) for spine, run in runs])
    for (_, run), made in zip(runs, told, strict=True):
        mine = [row for row in rows(sqlite_url) if row.get("run_id") == run]
        assert [row["decision_id"] for row in mine if row["kind"] == "decision"] == made
        assert mine[0]["kind"] == "run.started"
        assert [row["kind"] for row in mine].index("tx.begun") > max(
            place for place, row in enumerate(mine) if row["kind"] == "outcome"
        )
    assert_intact(sqlite_url)
