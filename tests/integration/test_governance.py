"""The governance switch: what each state lets run, how it expires, and that it binds every process from its commit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest

from spine import AuthorityDecision, OperationContext, OperationResult, Settings, Spine
from spine.governance.authority import GovernanceMode, GovernanceState
from spine.governance.facade import RunGovernanceFacade
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import ConfigurationError, JournalUnavailable
from tests.governed import authority_fields, intact, journal, query, running, together, until

OPS: dict[str, Any] = {"reason": "an exercise", "actor": "ann"}
HOUR_US = 3_600_000_000


def shop(url: str, **settings: Any) -> Spine:
    """A Spine with an operation that a rule denies above 10, and a buffered one."""
    spine = Spine(url, settings=Settings(**settings))

    @spine.rule("shop.*", id="limit")
    def limit(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params.get("amount", 0) > 10:
            return AuthorityDecision.deny("too much", code="LIMIT")
        return AuthorityDecision.allow()

    @spine.operation("shop.buy")
    @spine.operation("shop.look", durability="buffered")
    async def buy(ctx: OperationContext) -> dict[str, Any]:
        return {"bought": True}

    return spine


def clock() -> VirtualClock:
    return VirtualClock(time.time_ns() // 1000)


async def looked(virtual: VirtualClock) -> None:
    """The Spine on this clock has looked for other processes' switches and waits a second for the next look."""
    await until(lambda: any(moment == 1.0 for moment, *_ in virtual._sleepers))


buy = "shop.buy"


async def execute(spine: Spine, run_id: str | None = None, amount: int = 1, operation: str = buy) -> OperationResult:
    return await spine.execute(operation, tenant_id="acme", run_id=run_id, params={"amount": amount})


# -- what each state lets run


@pytest.mark.anyio
async def test_active_lets_everything_run_that_no_rule_denies(sqlite_url: str) -> None:
    """Calls outside runs, of a started run and of a new one; starts and completions."""
    spine = shop(sqlite_url)
    async with running(spine):
        assert (await spine.start_run("old", tenant_id="acme")).allowed
        for run_id in (None, "old", "new"):
            result = await execute(spine, run_id)
            assert result.success
            assert (result.metadata["governance_active"], result.metadata["authority_degraded"]) == (True, False)
            assert (await execute(spine, run_id, 11)).error_code == "LIMIT"
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert not done.flagged


@pytest.mark.anyio
async def test_bypassed_runs_what_a_rule_denies_and_tags_it(sqlite_url: str) -> None:
    """The kill switch: the rules are still asked and recorded, nothing they say binds, everything is tagged."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("old", tenant_id="acme")
        state = await spine.bypass(**OPS, for_s=60)
        assert (state.mode, state.epoch, state.active) == (GovernanceMode.BYPASSED, 2, False)
        for run_id in (None, "old", "new"):
            result = await execute(spine, run_id, 11)
            assert result.success
            assert result.decision is not None
            assert (result.decision.code, result.decision.conditions) == ("BYPASSED", ("governance_bypassed",))
            assert result.metadata["governance_active"] is False
        started = await spine.start_run("started under it", tenant_id="acme")
        assert (started.allowed, started.code) == (True, "BYPASSED")
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.metadata["governance_active"] is False
        assert done.flagged
    for body in journal(sqlite_url, "decision"):
        assert body["effect"] == "bypassed"
        assert body["governance_active"] is False
        assert body["would_have"] == {"code": "LIMIT", "reason": "too much"}
        assert [(rule["id"], rule["outcome"], rule["determined"]) for rule in body["rules"]] == [
            ("limit", "deny", False)
        ]
    intact(sqlite_url)


@pytest.mark.anyio
async def test_bypassed_bypasses_rules_and_nothing_else(sqlite_url: str) -> None:
    """Unknown operations, wrong params and another tenant's run are refused as ever."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("hers", tenant_id="other")
        await spine.bypass(**OPS)
        assert (await execute(spine, operation="shop.steal")).error_code == "UNKNOWN_OPERATION"
        assert (await execute(spine, "hers")).error_code == "TENANT_MISMATCH"
        wrong = await spine.execute(buy, tenant_id="acme", params={"amount": float("nan")})
        assert wrong.error_code == "INVALID_PARAMS"


@pytest.mark.anyio
async def test_degraded_refuses_new_runs_and_flags_existing_ones(sqlite_url: str) -> None:
    """A started run goes on and completes, flagged; a run that would begin now does not, whoever begins it."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("old", tenant_id="acme")
        await spine.degrade(**OPS)
        for run_id in ("old", None):
            result = await execute(spine, run_id)
            assert result.success
            assert (result.metadata["governance_active"], result.metadata["authority_degraded"]) == (True, True)
            assert (await execute(spine, run_id, 11)).error_code == "LIMIT"
        implicit = await execute(spine, "new")
        assert (implicit.success, implicit.error_code) == (False, "DEGRADED_NEW_RUN")
        explicit = await spine.start_run("new", tenant_id="acme")
        assert (explicit.allowed, explicit.code) == (False, "DEGRADED_NEW_RUN")
        assert "ann" in explicit.reason
        assert "an exercise" in explicit.reason
        assert (await spine.start_run("old", tenant_id="acme")).allowed
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert done.degraded
        assert (await spine.why("new")).verdict == "denied"
    assert query(sqlite_url, "SELECT run_id FROM runs") == [("old",)]
    (denied,) = journal(sqlite_url, "run.denied")
    assert denied["code"] == "DEGRADED_NEW_RUN"
    assert authority_fields(denied) == []


@pytest.mark.anyio
async def test_halted_runs_nothing_and_still_takes_completions(sqlite_url: str) -> None:
    """No operation runs, no run begins; what ran before may be completed, flagged."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.start_run("old", tenant_id="acme")
        await spine.halt(**OPS)
        for run_id in (None, "old", "new"):
            result = await execute(spine, run_id)
            assert (result.success, result.error_code) == (False, "HALTED")
            assert result.metadata["authority_code"] == "HALTED"
        assert (await spine.start_run("new", tenant_id="acme")).code == "HALTED"
        done = await spine.complete_run("old", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert done.degraded
    assert query(sqlite_url, "SELECT run_id FROM runs") == [("old",)]
    assert journal(sqlite_url, "outcome") == []


@pytest.mark.anyio
@pytest.mark.parametrize("state", ["degrade", "halt"])
async def test_the_completion_of_a_never_started_run_is_accepted_and_flagged(sqlite_url: str, state: str) -> None:
    """Completions are always accepted: the implied start is recorded as allowed and degraded, not as a denial."""
    spine = shop(sqlite_url)
    async with running(spine):
        await getattr(spine, state)(**OPS)
        done = await spine.complete_run("new", tenant_id="acme", run_status="succeeded")
        assert done.is_complete
        assert done.degraded
        why = await spine.why("new")
        assert (why.verdict, why.decisions) == ("succeeded", [])
        again = await spine.start_run("new", tenant_id="acme")
        assert (again.allowed, again.degraded) == (True, True)
    (started,) = journal(sqlite_url, "run.started")
    assert started["implicit"] is True
    assert (started["decision"]["allowed"], started["decision"]["degraded"]) == (True, True)
    assert started["authority_degraded"] is True


# -- switching


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("switch", "named"),
    [
        (lambda spine: spine.bypass(reason="", actor="ann"), "reason"),
        (lambda spine: spine.bypass(reason=" \n", actor="ann"), "reason"),
        (lambda spine: spine.bypass(reason="why", actor=""), "actor"),
        (lambda spine: spine.bypass(reason="why", actor=None), "actor"),
        (lambda spine: spine.bypass(reason=5, actor="ann"), "reason"),
        (lambda spine: spine.bypass(reason="why", actor="a\x00b"), "actor"),
        (lambda spine: spine.bypass(reason="w\x00y", actor="ann"), "reason"),
        (lambda spine: spine.bypass(**OPS, for_s=0), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=-1), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=4 * 3600 + 1), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=float("nan")), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=float("inf")), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=None), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=True), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s="60"), "for_s"),
        (lambda spine: spine.halt(reason="", actor="ann"), "reason"),
        (lambda spine: spine.degrade(reason="why", actor=" "), "actor"),
        (lambda spine: spine.restore(reason="", actor="ann"), "reason"),
    ],
)
async def test_a_switch_without_reason_actor_or_bounded_time_is_refused(
    sqlite_url: str, switch: Callable[[Spine], Any], named: str
) -> None:
    """Who, why and, for a bypass, until when: at most four hours. A refused switch changes and records nothing."""
    spine = shop(sqlite_url)
    async with running(spine):
        with pytest.raises(ConfigurationError, match=named):
            await switch(spine)
        assert spine.health().governance["state"] == "active"
    assert journal(sqlite_url) == []


@pytest.mark.anyio
async def test_a_bypass_lasts_an_hour_unless_told_otherwise(sqlite_url: str) -> None:
    """The default is one hour, the longest is four, and the journal says until when."""
    spine = shop(sqlite_url, clock=clock())
    async with running(spine):
        default = await spine.bypass(**OPS)
        longest = await spine.bypass(**OPS, for_s=4 * 3600)
    for state, hours in ((default, 1), (longest, 4)):
        assert state.expires_at is not None
        assert state.expires_at - state.since_at == hours * HOUR_US
    assert [body["expires_at"] for body in journal(sqlite_url)[:2]] == [default.expires_at, longest.expires_at]


@pytest.mark.anyio
async def test_every_switch_is_journaled_with_its_epoch_and_survives_a_restart(sqlite_url: str) -> None:
    """The chain of states can be read in the journal, and the next process begins where it stands."""
    spine = shop(sqlite_url)
    async with running(spine):
        for number, switch in enumerate([spine.degrade, spine.halt, spine.bypass, spine.restore, spine.halt], start=2):
            state = await switch(reason=f"step {number}", actor="ann")
            assert state.epoch == number
            assert spine.health().governance["state"] == state.mode.value
    changes = journal(sqlite_url, "governance.changed")
    assert [(body["from"], body["to"], body["epoch"], body["reason"]) for body in changes] == [
        ("active", "degraded", 2, "step 2"),
        ("degraded", "halted", 3, "step 3"),
        ("halted", "bypassed", 4, "step 4"),
        ("bypassed", "active", 5, "step 5"),
        ("active", "halted", 6, "step 6"),
    ]
    again = shop(sqlite_url)
    async with running(again):
        assert (again.health().governance["state"], again.health().governance["epoch"]) == ("halted", 6)
        assert (await execute(again)).error_code == "HALTED"
    intact(sqlite_url)


# -- the end of a bypass


@pytest.mark.anyio
async def test_an_expired_bypass_governs_again_restores_itself_and_reports(sqlite_url: str) -> None:
    """From the moment of its expiry rules bind, before anybody restored anything; then the restoration is journaled."""
    virtual = clock()
    spine = shop(sqlite_url, clock=virtual)
    async with running(spine):
        await spine.bypass(**OPS, for_s=2)
        assert (await execute(spine, "run-1", 11)).success
        assert (await execute(spine, "run-1", 1)).success
        await virtual.advance(1)
        assert (await execute(spine, None, 12)).success
        virtual._now += 1.0  # the moment has come, and nobody has been woken yet
        assert spine.health().governance["state"] == "active"
        assert (await execute(spine, "run-1", 11)).error_code == "LIMIT"
        await until(lambda: journal(sqlite_url, "governance.report"), clock=virtual)
        assert spine.health().governance["state"] == "active"
        assert (await execute(spine, "run-1", 11)).error_code == "LIMIT"
    _, restored = journal(sqlite_url, "governance.changed")
    assert (restored["from"], restored["to"], restored["actor"]) == ("bypassed", "active", "spine")
    assert "expired" in restored["reason"]
    (report,) = journal(sqlite_url, "governance.report")
    assert (report["epoch"], report["denied"]) == (2, 2)
    assert [(d["operation"], d["run_id"], d["code"]) for d in report["would_have_denied"]] == [
        (buy, "run-1", "LIMIT"),
        (buy, None, "LIMIT"),
    ]
    intact(sqlite_url)


@pytest.mark.anyio
async def test_restoring_a_bypass_reports_what_it_let_through(database_url: str) -> None:
    """Every denial is counted, the first hundred are listed, and only what the rules would have denied is on it."""
    spine = shop(database_url)

    @spine.rule("shop.*", id="on trial", mode="shadow")
    def trial(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("a shadow denies nobody", code="SHADOW")

    async with running(spine):
        await spine.bypass(**OPS)
        calls = [partial(execute, spine, f"run-{n % 3}", 11 if n < 105 else 1) for n in range(110)]
        results = await together(*calls)
        assert all(result.success for result in results)
        state = await spine.restore(reason="over", actor="bob")
    assert (state.mode, len(state.would_have_denied)) == (GovernanceMode.ACTIVE, 100)
    (report,) = journal(database_url, "governance.report")
    assert (report["epoch"], report["denied"], len(report["would_have_denied"])) == (2, 105, 100)
    assert {denial["code"] for denial in report["would_have_denied"]} == {"LIMIT"}
    assert list(state.would_have_denied) == report["would_have_denied"]
    assert "would_have_denied" in state.to_dict()


@pytest.mark.anyio
async def test_a_bypass_expires_while_no_process_runs(sqlite_url: str) -> None:
    """A process that starts on a database whose bypass is over governs from its first call, and restores it."""
    first = clock()
    spine = shop(sqlite_url, clock=first)
    async with running(spine):
        await spine.bypass(**OPS, for_s=60)
    later = VirtualClock(first.time_us() + 61_000_000)
    again = shop(sqlite_url, clock=later)
    async with running(again):
        assert (await execute(again, None, 11)).error_code == "LIMIT"
        await until(lambda: journal(sqlite_url, "governance.changed")[1:], clock=later)
    assert [body["to"] for body in journal(sqlite_url, "governance.changed")] == ["bypassed", "active"]


@pytest.mark.anyio
@pytest.mark.parametrize("switch", ["halt", "degrade", "restore"])
async def test_an_expiring_bypass_undoes_nothing_that_was_switched_since(sqlite_url: str, switch: str) -> None:
    """A process that still believes in the bypass when it expires must not put its own restoration over an operator's
    word: a halt stays a halt."""
    here, there = shop(sqlite_url, clock=(clock_here := clock())), shop(sqlite_url, clock=(clock_there := clock()))
    async with running(here):
        await here.bypass(**OPS, for_s=2)
        async with running(there):
            assert there.health().governance["state"] == "bypassed"
            state = await getattr(here, switch)(reason="by hand", actor="bob")
            for _ in range(4):
                await clock_there.advance(1)
                await clock_here.advance(1)
            # Whoever wanted to restore has had its say once these have been recorded.
            for spine in (there, here):
                await execute(spine, "run-1", 1)
            assert there.health().governance["epoch"] == state.epoch
    changes = journal(sqlite_url, "governance.changed")
    assert [(body["to"], body["reason"]) for body in changes] == [
        ("bypassed", "an exercise"),
        (state.mode.value, "by hand"),
    ]


@pytest.mark.anyio
async def test_two_processes_restore_an_expired_bypass_once(database_url: str) -> None:
    """Both see it expire; one restoration and one report are in the journal."""
    first, second = clock(), clock()
    here, there = shop(database_url, clock=first), shop(database_url, clock=second)
    async with running(here):
        await here.bypass(**OPS, for_s=2)
        async with running(there):
            await execute(there, None, 11)
            for _ in range(4):
                await together(partial(first.advance, 1), partial(second.advance, 1))
            for spine, virtual in ((here, first), (there, second)):
                await until(lambda spine=spine: spine.health().governance["state"] == "active", clock=virtual)
                await execute(spine, None, 1)
            await until(lambda: journal(database_url, "governance.report"), clock=first)
    assert [body["to"] for body in journal(database_url, "governance.changed")] == ["bypassed", "active"]
    (report,) = journal(database_url, "governance.report")
    assert report["denied"] == 1


# -- several processes, one authority


@pytest.mark.anyio
async def test_a_switch_elsewhere_binds_the_next_operation_here(database_url: str) -> None:
    """A decision under an older epoch is not written but decided again: the very next call is bound."""
    here, there = shop(database_url), shop(database_url)
    async with running(here, there):
        assert (await execute(there, "run-1")).success
        await here.halt(**OPS)
        assert (await execute(there, "run-1")).error_code == "HALTED"
        await here.restore(**OPS)
        assert (await execute(there, "run-1")).success
        await here.bypass(**OPS)
        assert (await execute(there, "run-1", 11)).success
        await here.restore(**OPS)
        assert (await execute(there, "run-1", 11)).error_code == "LIMIT"


@pytest.mark.anyio
async def test_a_switch_elsewhere_binds_the_next_start_here(database_url: str) -> None:
    """A start is decided under the state that is committed: refused once degraded, and no longer once restored."""
    here, there = shop(database_url), shop(database_url)
    async with running(here, there):
        await here.degrade(**OPS)
        assert (await there.start_run("run-1", tenant_id="acme")).code == "DEGRADED_NEW_RUN"
        await here.restore(**OPS)
        assert (await there.start_run("run-1", tenant_id="acme")).allowed
        await here.halt(**OPS)
        assert (await there.start_run("run-2", tenant_id="acme")).code == "HALTED"
        await here.restore(**OPS)
        assert (await there.start_run("run-2", tenant_id="acme")).allowed


@pytest.mark.anyio
@pytest.mark.parametrize("refused", ["unknown", "invalid"])
async def test_a_refused_call_starts_no_run_behind_a_switch_elsewhere(database_url: str, refused: str) -> None:
    """What is refused without asking any rule is decided under the committed state too: degraded starts no run."""
    here, there = shop(database_url), shop(database_url, clock=(virtual := clock()))
    async with running(here, there):
        await looked(virtual)
        await here.degrade(**OPS)
        if refused == "unknown":
            result = await execute(there, "new", operation="shop.steal")
            assert result.error_code == "UNKNOWN_OPERATION"
        else:
            result = await there.execute(buy, tenant_id="acme", run_id="new", params=[])  # type: ignore[arg-type]
            assert result.error_code == "INVALID_PARAMS"
        assert (await execute(there, "new")).error_code == "DEGRADED_NEW_RUN"
    decided, _ = journal(database_url, "decision")
    assert (decided["run_id"], decided["epoch"]) == ("new", 2)
    assert journal(database_url, "run.started") == []


@pytest.mark.anyio
async def test_a_report_behind_a_switch_elsewhere_starts_its_run_flagged(database_url: str) -> None:
    """A report is always accepted; the run that it starts carries the state that is committed, not the last known."""
    here, there = shop(database_url), shop(database_url, clock=(virtual := clock()))
    async with running(here, there):
        await looked(virtual)
        await here.degrade(**OPS)
        assert await RunGovernanceFacade(there.ask).create_policy_evaluation("new", "acme", "succeeded")
    (started,) = journal(database_url, "run.started")
    assert (started["epoch"], started["authority_code"], started["authority_degraded"]) == (2, "DEGRADED", True)


@pytest.mark.anyio
@pytest.mark.parametrize("work", ["start", "denied start", "report"])
async def test_a_state_that_cannot_be_read_is_not_asked_for_without_end(sqlite_url: str, work: str) -> None:
    """The commit says that the state moved on, the reader cannot tell to what: refused at once, and later done."""
    here, there = shop(sqlite_url), shop(sqlite_url, clock=(virtual := clock()))
    async with running(here, there):
        await looked(virtual)
        if work == "denied start":
            await there.degrade(**OPS)
            await here.restore(**OPS)
        await here.halt(**OPS)

        async def unreadable() -> None:
            raise JournalUnavailable("a table is away")

        reader, there._system.reader.governance = there._system.reader.governance, unreadable  # type: ignore[method-assign]
        with anyio.fail_after(5):
            if work == "report":
                facade = RunGovernanceFacade(there.ask)
                assert await facade.create_policy_evaluation("new", "acme", "succeeded") is None
            else:
                assert (await there.start_run("new", tenant_id="acme")).code == "JOURNAL_UNAVAILABLE"
        there._system.reader.governance = reader  # type: ignore[method-assign]
        assert (await there.start_run("new", tenant_id="acme")).code == "HALTED"


@pytest.mark.anyio
async def test_a_switch_elsewhere_binds_buffered_operations_here_within_a_second(sqlite_url: str) -> None:
    """Who never waits for a commit learns of a halt all the same: by its own commits, or by looking once a second."""
    virtual = clock()
    here, there = shop(sqlite_url), shop(sqlite_url, clock=virtual)
    async with running(here, there):
        assert (await execute(there, operation="shop.look")).success
        await here.halt(**OPS)
        await execute(there, operation="shop.look")
        await there.flush()
        await until(lambda: there.health().governance["state"] == "halted", clock=virtual)
        assert virtual.monotonic() <= 3
        assert (await execute(there, operation="shop.look")).error_code == "HALTED"


@pytest.mark.anyio
async def test_a_buffered_decision_of_the_old_epoch_that_comes_in_behind_a_halt_says_so(sqlite_url: str) -> None:
    """Within one process too: whatever the journal holds behind the switch was decided under it, or is marked late."""
    spine = shop(sqlite_url)
    stop = False

    async def work() -> None:
        while not stop:
            await execute(spine, operation="shop.look")

    async with running(spine), anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(work)
        for switch in (spine.halt, spine.restore) * 5:
            await switch(**OPS)
            before = spine.health().journal["units"]
            await until(lambda before=before: spine.health().journal["units"] > before + 20)
        stop = True
    check_epochs(journal(sqlite_url))


@pytest.mark.anyio
async def test_concurrent_switches_from_two_processes_make_one_chain(database_url: str) -> None:
    """Each epoch is set once, each from the state before it."""
    here, there = shop(database_url), shop(database_url)
    async with running(here, there):
        switches = [partial(getattr(s, name), **OPS) for name in ("halt", "degrade", "restore") for s in (here, there)]
        states = await together(*switches * 3)
    assert sorted(state.epoch for state in states) == list(range(2, 20))
    check_epochs(journal(database_url))


def check_epochs(bodies: list[dict[str, Any]]) -> None:
    """Walk the journal: each switch follows the one before, each decision is of the epoch it stands in.

    Only what ran without waiting for its record may come late, and then says so.
    """
    mode, epoch = "active", 1
    for body in bodies:
        if body["kind"] == "governance.changed":
            assert (body["from"], body["epoch"]) == (mode, epoch + 1), body
            mode, epoch = body["to"], body["epoch"]
        elif body["kind"] == "decision" and body.get("late"):
            assert body["durability"] == "buffered"
            assert body["epoch"] < epoch
        elif body["kind"] == "decision":
            assert body["epoch"] == epoch, (mode, epoch, body)
            assert (body["allowed"], body["code"]) in {
                "active": [(True, "ALLOWED")],
                "degraded": [(True, "DEGRADED"), (False, "DEGRADED_NEW_RUN")],
                "halted": [(False, "HALTED")],
                "bypassed": [(True, "BYPASSED")],
            }[mode], (mode, body)
        elif body["kind"] == "run.started":
            assert body["epoch"] == epoch
            assert mode in ("active", "bypassed"), body
        elif body["kind"] == "run.denied":
            assert (body["epoch"], body["code"]) in [(epoch, "HALTED"), (epoch, "DEGRADED_NEW_RUN")], body
            assert body["code"] == {"halted": "HALTED", "degraded": "DEGRADED_NEW_RUN"}[mode], body


WORKER = """
import asyncio, sys
from spine import AuthorityDecision, Spine

async def main(url, name):
    spine = Spine(url)

    @spine.operation("load.work")
    async def work(ctx):
        return {}

    stop, codes = False, set()

    async def call(n):
        done = 0
        while not stop:
            done += 1
            result = await spine.execute("load.work", tenant_id="acme", run_id=f"{name}-{n}" if n % 2 else None)
            codes.add(result.error_code)
            if n == 0:
                await spine.start_run(f"{name}-start-{done}", tenant_id="acme")

    async with spine:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        calls = [asyncio.create_task(call(n)) for n in range(8)]
        for number in range(6):
            for switch in (spine.degrade, spine.halt, spine.bypass, spine.restore):
                await switch(reason=f"{name} {number}", actor=name)
                await spine.execute("load.work", tenant_id="acme")
        stop = True
        await asyncio.gather(*calls)
    print(*sorted(map(str, codes)), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_two_processes_switch_under_load_and_no_decision_of_an_older_epoch_follows_a_switch(database_url: str) -> None:
    """Real processes, real contention: in the journal's order every decision is of the state that stands there."""
    command = [sys.executable, "-c", WORKER, database_url]
    workers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        told = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            out, _ = worker.communicate(timeout=50)
            assert worker.returncode == 0
            told.append(set(out.split()))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    bodies = journal(database_url)
    switches = [body for body in bodies if body["kind"] == "governance.changed"]
    assert len(switches) == 48
    assert any(one["actor"] != other["actor"] for one, other in pairwise(switches)), "they never met"
    assert all(codes <= {"None", "HALTED", "DEGRADED_NEW_RUN"} for codes in told), told
    check_epochs(bodies)
    intact(database_url)


# -- a state that cannot be read


@pytest.mark.anyio
async def test_a_state_that_makes_no_sense_is_governed(sqlite_url: str) -> None:
    """Before any state was known, one that cannot be read governs: rules bind, and operators can set it right."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.halt(**OPS)
    query(sqlite_url, "UPDATE governance SET state = 'purple'")
    spine = shop(sqlite_url)
    async with running(spine):
        assert spine.health().governance["state"] == "active"
        with anyio.fail_after(5):
            assert (await execute(spine, None, 11)).error_code == "LIMIT"
            assert (await execute(spine, None, 1)).success
            await spine.degrade(**OPS)
            assert (await execute(spine, "new")).error_code == "DEGRADED_NEW_RUN"


@pytest.mark.anyio
async def test_a_state_that_cannot_be_read_any_more_is_the_last_known_one(database_url: str) -> None:
    """The registry restarts while the state's table is away: halted it was, halted it stays."""
    spine = shop(database_url)
    async with running(spine):
        await spine.halt(**OPS)
        assert (await execute(spine)).error_code == "HALTED"
        query(database_url, "ALTER TABLE governance RENAME TO governance_away")
        registry = spine._system.supervisor._children["registry"]
        assert registry.task is not None
        registry.task.cancel()
        await until(lambda: spine.health().restarts == 1 and spine.health().actors["registry"] == "ready")
        assert (await execute(spine)).error_code == "HALTED"
        assert spine.health().governance["state"] == "halted"
        query(database_url, "ALTER TABLE governance_away RENAME TO governance")
        await spine.restore(**OPS)
        assert (await execute(spine)).success


def test_an_effective_state_is_active_from_the_moment_of_expiry() -> None:
    """The pure rule behind it: at the very microsecond, and for a bypass alone."""
    bypass = GovernanceState(GovernanceMode.BYPASSED, 2, "why", "ann", 0, expires_at=100)
    assert bypass.effective(99) is bypass
    assert bypass.effective(100).mode is GovernanceMode.ACTIVE
    halted = GovernanceState(GovernanceMode.HALTED, 2, "why", "ann", 0)
    assert halted.effective(10**18) is halted
    assert json.dumps(halted.to_dict())
