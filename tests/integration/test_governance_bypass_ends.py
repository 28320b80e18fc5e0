"""A bypass that is over governs again by itself, and reports what it let through."""

from __future__ import annotations

import json
from functools import partial

import pytest

from spine import AuthorityDecision, OperationContext
from spine.governance.authority import GovernanceMode, GovernanceState
from spine.kernel.clock import VirtualClock
from tests.governed import intact, journal, running, together, until
from tests.integration.governed_shop import OPS, buy, clock, execute, shop


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


def test_an_effective_state_is_active_from_the_moment_of_expiry() -> None:
    """The pure rule behind it: at the very microsecond, and for a bypass alone."""
    bypass = GovernanceState(GovernanceMode.BYPASSED, 2, "why", "ann", 0, expires_at=100)
    assert bypass.effective(99) is bypass
    assert bypass.effective(100).mode is GovernanceMode.ACTIVE
    halted = GovernanceState(GovernanceMode.HALTED, 2, "why", "ann", 0)
    assert halted.effective(10**18) is halted
    assert json.dumps(halted.to_dict())
