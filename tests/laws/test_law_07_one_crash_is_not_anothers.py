"""Law 7: one actor's crash is not another's.

Callers get an error naming actor, message and restart; queued messages survive.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from spine import OperationContext, OperationResult, Spine
from spine.governance.facade import CreatePolicyEvaluation
from spine.governance.transactions import TransactionFailed
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import ActorCrashed, SpineFailed
from spine.kernel.supervisor import Policy
from spine.settings import Settings
from tests.laws.world import (
    START_US,
    assert_intact,
    back,
    ended,
    file_of,
    found,
    incarnation,
    kill,
    poison,
    recording,
    rows,
    unanswered,
    until,
)

pytestmark = pytest.mark.anyio

ACTORS = ("audit", "router", "registry", "coordinator")


def make(url: str, release: asyncio.Event, **options: Any) -> Spine:
    spine = Spine(url, settings=Settings(**options))

    @spine.operation("work.hold")
    async def hold(ctx: OperationContext) -> dict[str, str]:
        await release.wait()
        return {"held": "to the end"}

    @spine.operation("work.fine")
    async def fine(ctx: OperationContext) -> None:
        pass

    @spine.operation("work.outer")
    async def outer(ctx: OperationContext) -> OperationResult:
        return await ctx.execute("work.fine")

    return spine


@contextmanager
def locked(url: str) -> Iterator[None]:
    """The journal cannot be written meanwhile: another process holds the lock."""
    with closing(sqlite3.connect(file_of(url), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("actor", ["audit", "registry", "coordinator"])
async def test_a_message_that_an_actor_does_not_understand_crashes_only_that_actor(sqlite_url: str, actor: str) -> None:
    """Its sender hears the actor, the message and the restart; the others keep their incarnations; a report remains."""
    release = asyncio.Event()
    release.set()
    spine = make(sqlite_url, release)
    async with spine:
        others = {name: incarnation(name) for name in ACTORS if name != actor}
        sent = poison(spine, actor)
        with pytest.raises(ActorCrashed) as caught:
            await spine._system.exchange.answer(sent)
        assert caught.value.actor == actor
        assert caught.value.msg_id == spine._system.exchange.tracer.msg_id(sent.number)
        assert caught.value.restart == 1
        assert f"actor {actor!r} crashed while it held message {caught.value.msg_id}" in str(caught.value)
        await back(spine, actor)
        assert {name: incarnation(name) for name in others} == others
        assert spine.health().actors == dict.fromkeys(ACTORS, "ready")
        (report,) = spine.health().crashes
        assert (report["actor"], report["restart"], report["intensity"]) == (actor, 1, 3)
        assert "Poison" in report["messages"][0]
        assert "Poison" in {passage["kind"] for passage in report["ring"]}
        assert (await spine.execute("work.outer", tenant_id="acme", run_id="run-1")).success
        await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
    assert_intact(sqlite_url)


@pytest.mark.parametrize("actor", ACTORS)
async def test_messages_that_wait_in_the_queue_survive_the_crash(sqlite_url: str, actor: str) -> None:
    """The actor is down for a while; whatever comes meanwhile lies in its mailbox and is handled by the next one."""
    clock, release = VirtualClock(START_US), asyncio.Event()
    release.set()
    spine = make(sqlite_url, release, clock=clock, supervision=Policy(backoff_first_s=2, backoff_most_s=2))
    async with spine:
        await spine.start_run("run-0", tenant_id="acme")
        await kill(spine, actor)
        calls = [
            *[
                asyncio.ensure_future(spine.execute("work.outer", tenant_id="acme", run_id=f"run-{n}"))
                for n in range(8)
            ],
            *[
                asyncio.ensure_future(spine.complete_run(f"done-{n}", tenant_id="acme", run_status="succeeded"))
                for n in range(8)
            ],
            *[
                asyncio.ensure_future(spine.ask(CreatePolicyEvaluation(f"eval-{n}", "acme", "succeeded")))
                for n in range(4)
            ],
        ]
        await until(lambda: spine.health().mailboxes[actor] >= 4)
        assert spine.health().actors[actor] == "stopped"
        await clock.advance(4)
        results = await ended(calls)
        assert not [result for result in results if isinstance(result, BaseException)], results
        assert all(result.success for result in results[:8])
        assert all(results[16:])
        assert spine.health().restarts == 1
        assert not unanswered(rows(sqlite_url))
        assert len(found(sqlite_url, "tx.committed")) == 8
    assert_intact(sqlite_url)


@pytest.mark.parametrize("actor", ["audit", "router", "coordinator"])
async def test_work_in_progress_goes_on_when_another_actor_crashes(sqlite_url: str, actor: str) -> None:
    """Handlers run in tasks of the registry: the crash of any other actor does not touch them."""
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    async with spine:
        held = [asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme", run_id="run-1")) for _ in range(5)]
        await until(lambda: spine.health().decisions["allowed"] == 5)
        await kill(spine, actor)
        release.set()
        assert [result.data for result in await ended(held)] == [{"held": "to the end"}] * 5
        await back(spine, actor)
    assert len(found(sqlite_url, "outcome", success=True)) == 5


async def test_the_work_of_a_crashed_registry_is_interrupted_and_recorded(sqlite_url: str) -> None:
    """Its own handlers end with it, each with a recorded outcome that its caller hears; new calls work at once."""
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    async with spine:
        held = [asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme", run_id="run-1")) for _ in range(5)]
        await until(lambda: spine.health().decisions["allowed"] == 5)
        asked = poison(spine, "registry")
        behind = asyncio.ensure_future(spine.execute("work.fine", tenant_id="acme"))
        results = await ended(held)
        assert [result.error_code for result in results] == ["INTERRUPTED"] * 5
        assert all(result.durable for result in results)
        with pytest.raises(ActorCrashed):
            await spine._system.exchange.answer(asked)
        assert (await behind).success
        assert len(found(sqlite_url, "outcome", error_code="INTERRUPTED")) == 5
        # The switch is read again from the journal, the slots are free.
        assert (await spine.status())["operations"]["work.hold"]["running"] == 0


async def test_a_registry_that_dies_while_calls_are_decided_does_not_wait_for_itself(sqlite_url: str) -> None:
    """Calls whose decision was on its way to the journal do not start their handlers in a registry that is ending:
    a handler that nested a call there would wait for the registry that waits for it."""
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    async with spine:
        with locked(sqlite_url):
            calls = [asyncio.ensure_future(spine.execute("work.outer", tenant_id="acme")) for _ in range(5)]
            await until(lambda: spine.health().decisions["allowed"] == 5)
            incarnation("registry").cancel()
            for _ in range(10):
                await asyncio.sleep(0)
        began = time.monotonic()
        await back(spine, "registry")
        assert time.monotonic() - began < 2.5
        results = await ended(calls)
        assert all(isinstance(result, (OperationResult, ActorCrashed)) for result in results)
        assert (await spine.execute("work.outer", tenant_id="acme")).success
        await until(lambda: not unanswered(rows(sqlite_url)))


# -- the audit actor


async def test_what_a_crashed_audit_actor_had_written_is_found_in_the_journal(sqlite_url: str) -> None:
    """Killed in the middle of a commit that succeeds: the callers hear success, nothing is written twice."""
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    async with spine:
        await spine.start_run("run-1", tenant_id="acme")
        with locked(sqlite_url):
            calls = [
                asyncio.ensure_future(spine.execute("work.fine", tenant_id="acme", run_id="run-1")) for _ in range(10)
            ]
            await until(lambda: len(list(spine._system.exchange.ledger.held_by("audit"))) >= 10)
            incarnation("audit").cancel()
            await until(lambda: spine.health().restarts == 1)
        results = await ended(calls)
        assert [(result.success, result.durable) for result in results] == [(True, True)] * 10
        assert {row["decision_id"] for row in found(sqlite_url, "decision")} == {
            result.metadata["decision_id"] for result in results
        }
    assert len(found(sqlite_url, "decision")) == len(found(sqlite_url, "outcome")) == 10
    assert_intact(sqlite_url)


async def test_what_a_crashed_audit_actor_had_taken_and_not_written_is_told_as_not_recorded(sqlite_url: str) -> None:
    """Records in one batch with a message that crashes it: no handler runs unrecorded, the caller hears who crashed."""
    release = asyncio.Event()
    spine, ran = make(sqlite_url, release, supervision=Policy(intensity=10)), []

    @spine.operation("work.counted")
    async def counted(ctx: OperationContext) -> None:
        ran.append("ran")

    async with spine:
        with locked(sqlite_url):
            # The first commit holds the audit actor up; what comes next lies together in its mailbox.
            first = asyncio.ensure_future(spine.execute("work.fine", tenant_id="acme"))
            await until(lambda: recording(spine, taken=True))
            calls = [asyncio.ensure_future(spine.execute("work.counted", tenant_id="acme")) for _ in range(5)]
            await until(lambda: spine.health().mailboxes["audit"] == 5)
            asked = poison(spine, "audit")
            await until(lambda: spine.health().mailboxes["audit"] == 6)
        results = await ended(calls)
        with pytest.raises(ActorCrashed):
            await spine._system.exchange.answer(asked)
        assert (await first).success
        assert ran == []
        for result in results:
            assert result.error_code == "JOURNAL_UNAVAILABLE"
            assert not result.durable
            assert re.search(r"actor 'audit' crashed while it held message \w+-\d+ .*restarted \(1\)", result.error)
        assert (await spine.execute("work.counted", tenant_id="acme")).success
    assert len(found(sqlite_url, "decision")) == 2
    assert_intact(sqlite_url)


async def test_an_outcome_that_crashed_with_the_audit_actor_is_recorded_later(sqlite_url: str) -> None:
    """The handler ran: the caller hears OUTCOME_UNRECORDED, and the outcome is in the journal soon after."""
    release = asyncio.Event()
    spine = make(sqlite_url, release, supervision=Policy(intensity=10))
    async with spine:
        held = asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme"))
        await until(lambda: spine.health().decisions["allowed"] == 1)
        # Not only committed but answered: what the audit actor takes next is what comes next.
        await until(lambda: unanswered(rows(sqlite_url)) and not recording(spine, taken=True))
        with locked(sqlite_url):
            blocker = asyncio.ensure_future(spine.execute("work.fine", tenant_id="acme"))
            await until(lambda: "decision" in recording(spine, taken=True))
            release.set()
            await until(lambda: "outcome" in recording(spine, taken=False))
            asked = poison(spine, "audit")
            await until(lambda: asked.seq)
        result = await held
        assert (result.success, result.error_code, result.durable) == (False, "OUTCOME_UNRECORDED", False)
        assert result.data == {"held": "to the end"}
        with pytest.raises(ActorCrashed):
            await spine._system.exchange.answer(asked)
        assert (await blocker).success
        await until(lambda: not unanswered(rows(sqlite_url)))
        await until(lambda: spine.health().journal["unrecorded"] == 0)
    (outcome,) = found(sqlite_url, "outcome", operation="work.hold")
    assert outcome["success"]
    assert_intact(sqlite_url)


async def test_a_completion_survives_the_crash_of_the_audit_actor_in_its_commit(sqlite_url: str) -> None:
    """Looked up in the journal like any unit: the run is completed once and told as completed."""
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    async with spine:
        with locked(sqlite_url):
            call = asyncio.ensure_future(spine.complete_run("run-1", tenant_id="acme", run_status="succeeded"))
            await until(lambda: recording(spine, taken=True))
            incarnation("audit").cancel()
            await until(lambda: spine.health().restarts == 1)
        assert (await call).is_complete
        assert len(found(sqlite_url, "tx.committed", run_id="run-1")) == 1
    assert_intact(sqlite_url)


# -- several crashes


async def test_two_actors_that_crash_together_are_back_together(sqlite_url: str) -> None:
    """The registry asks the audit actor when it starts, and that one is down just then: neither waits for the other."""
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    async with spine:
        incarnation("registry").cancel()
        await until(lambda: spine.health().actors["registry"] != "ready")
        incarnation("audit").cancel()
        began = time.monotonic()
        result = await spine.execute("work.fine", tenant_id="acme", timeout_s=20)
        assert result.success, result.error
        assert time.monotonic() - began < 5
        assert spine.health().actors == dict.fromkeys(ACTORS, "ready")


async def test_all_actors_crash_at_once_and_all_come_back(sqlite_url: str) -> None:
    """Four crashes are within an intensity of four; whoever waits meanwhile is served."""
    release = asyncio.Event()
    release.set()
    spine = make(sqlite_url, release, supervision=Policy(intensity=4))
    async with spine:
        for name in ACTORS:
            incarnation(name).cancel()
        calls = [asyncio.ensure_future(spine.execute("work.outer", tenant_id="acme")) for _ in range(10)]
        calls.append(asyncio.ensure_future(spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")))
        results = await ended(calls)
        assert not [result for result in results if isinstance(result, BaseException)], results
        assert all(result.success for result in results[:10])
        assert spine.health().restarts == 4
    assert_intact(sqlite_url)


async def test_beyond_the_intensity_every_call_gets_spine_failed(sqlite_url: str) -> None:
    """Three crashes are mended, the fourth within five seconds ends the Spine: callers that wait, and all that follow.

    What it leaves is whole: the next Spine on the database goes on.
    """
    release = asyncio.Event()
    spine = make(sqlite_url, release)
    await spine.start()
    waiting = asyncio.ensure_future(spine.execute("work.hold", tenant_id="acme", run_id="run-1"))
    await until(lambda: spine.health().decisions["allowed"] == 1)
    for crash in range(1, 5):
        asked = poison(spine, "coordinator")
        results = await ended([spine._system.exchange.answer(asked)])
        assert isinstance(results[0], ActorCrashed)
        if crash < 4:
            await back(spine, "coordinator", crash)
    with pytest.raises(SpineFailed, match=r"'coordinator' crashed more than 3 times in 5\.0 s"):
        await waiting
    calls = [
        lambda: spine.execute("work.fine", tenant_id="acme"),
        lambda: spine.execute("work.fine", tenant_id="acme", wait=True),
        lambda: spine.start_run("run-2", tenant_id="acme"),
        lambda: spine.complete_run("run-1", tenant_id="acme", run_status="succeeded"),
        lambda: spine.degrade(reason="a test", actor="law 7"),
        lambda: spine.ask(CreatePolicyEvaluation("run-1", "acme", "succeeded")),
        spine.status,
    ]
    for call in calls:
        with pytest.raises(SpineFailed):
            await call()
    assert spine.health().status == "failed"
    assert not spine.health().ok
    assert len(spine.health().crashes) == 4
    receipts = await spine.stop()
    assert {receipt.child for receipt in receipts} == set(ACTORS)
    assert_intact(sqlite_url)
    clock = VirtualClock(time.time_ns() // 1000 + 60_000_000)
    async with make(sqlite_url, release, clock=clock) as again:
        assert (await again.execute("work.fine", tenant_id="acme", run_id="run-1")).success
        await until(lambda: not unanswered(rows(sqlite_url)))


async def test_crashes_further_apart_than_the_period_do_not_add_up(sqlite_url: str) -> None:
    """Five crashes, one every six seconds of the clock, with the default three in five."""
    clock, release = VirtualClock(START_US), asyncio.Event()
    spine = make(sqlite_url, release, clock=clock)
    async with spine:
        for crash in range(1, 6):
            asked = poison(spine, "coordinator")
            assert isinstance((await ended([spine._system.exchange.answer(asked)]))[0], ActorCrashed)
            await clock.advance(6)
            await back(spine, "coordinator", crash)
        assert spine.health().ok


async def test_a_handler_a_rule_or_a_domain_that_raises_crashes_no_actor(sqlite_url: str) -> None:
    """Foreign code fails as an outcome, a decision or a rolled back completion; the actors live on."""

    class Broken:
        name = "broken"
        after = ()

        def plan(self, run: Any) -> Any:
            raise ZeroDivisionError("the domain's own")

    spine = Spine(sqlite_url, domains=[Broken()])

    @spine.rule("work.ruled")
    def broken(ctx: OperationContext) -> Any:
        raise RuntimeError("the rule's own")

    @spine.operation("work.ruled")
    @spine.operation("work.fine")
    async def raises(ctx: OperationContext) -> None:
        raise KeyError("the handler's own")

    async with spine:
        before = {name: incarnation(name) for name in ACTORS}
        assert (await spine.execute("work.fine", tenant_id="acme")).error_code == "HANDLER_EXCEPTION:KeyError"
        assert (await spine.execute("work.ruled", tenant_id="acme")).error_code == "RULE_ERROR"
        with pytest.raises(TransactionFailed):
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        assert {name: incarnation(name) for name in ACTORS} == before
        assert spine.health().crashes == ()
