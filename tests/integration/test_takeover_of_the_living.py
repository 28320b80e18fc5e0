"""A Spine that lives, but whose lease is over, changes nothing more of what another took over, and is told its end."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from actors.attempts import ANEW_MOST
from spine import Spine, TransactionFailed
from spine.kernel.errors import JournalUnavailable
from tests.governed import Published, clock, flowing, intact, journal, query, running, until
from tests.integration.takeovers import epochs, late, pair
from tests.participants import (
    Pause,
    Remote,
    World,
    complete,
    coordinator,
    failure,
    over,
    raises,
    refuses,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]

GOOD = ["step.intend.before", "step.intend.after", "call.forward.before", "call.forward.after", "step.done.before"]
GOOD += ["step.done.after", "tx.commit.before"]
BACK = ["step.refused.before", "tx.abort.before", "tx.abort.after", "step.undo.before", "call.rollback.before"]
BACK += ["call.rollback.after", "step.undone.before", "tx.compensated.before"]
STUCK = ["step.park.before", "tx.park.before"]
ENDED = ["step.intend.after", "call.forward.before", "step.done.before", "tx.commit.before"]
ENDED += ["tx.abort.before", "call.rollback.before", "step.undone.before", "tx.compensated.before", "tx.park.before"]


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        *(("sqlite", moment) for moment in ENDED),
        *(
            pytest.param("postgresql", moment, marks=pytest.mark.postgresql)
            for moment in ("step.done.before", "tx.abort.before")
        ),
    ],
)
async def test_who_lost_its_transaction_changes_nothing_and_is_told_its_real_end(
    request: pytest.FixtureRequest, world: World, kind: str, moment: str
) -> None:
    """It stands still at each move while another Spine takes over and ends it; then its own writes do not count."""
    url: str = request.getfixturevalue(f"{kind}_url")
    no = refuses() if moment in [*BACK, *STUCK] else well
    stuck = raises(OSError("the bank is closed")) if moment in STUCK else well
    pause, clock = Pause(moment), late()
    publishers = Published(), Published()
    old = over(url, *pair(world, no, undo=stuck), failpoint=pause, clock=clock, publisher=publishers[0])
    new = over(url, *pair(world, no), publisher=publishers[1])
    end = "COMMITTED" if moment in GOOD else "ABORTED"
    with anyio.fail_after(30):
        async with running(old), flowing(clock):
            caller = asyncio.ensure_future(complete(old))
            await pause.reached.wait()
            async with running(new):
                await until(lambda: transactions(url) == [end])
                await until(lambda: not query(url, "SELECT 1 FROM outbox WHERE state = 'pending'"))
                before, called = journal(url), len(world.calls)
                tx_id = journal(url, "tx.begun")[0]["tx_id"]
                pause.let_go.set()
                if end == "COMMITTED":
                    done = await caller
                    assert done.is_complete
                    assert done.transaction_id == tx_id
                else:
                    with pytest.raises(TransactionFailed) as raised:
                        await caller
                    error = raised.value
                    assert (error.phase, error.code, error.failed_domain) == ("ROLLED_BACK", "NO_FUNDS", "ship")
                    assert error.transaction_id == tx_id
                    assert {result.domain: result.state for result in error.domains}["pay"] == "ROLLED_BACK"
                assert journal(url) == before
    # One that stood between its intent and its call still makes that call, under the epoch by which it is refused.
    late_calls = [(call.what, call.effect.epoch) for call in world.calls[called:]]
    assert late_calls == {
        "step.intend.after": [("forward", 1)],
        "call.forward.before": [("forward", 1)],
        "call.rollback.before": [("rollback", 1)],
    }.get(moment, [])
    assert world.standing() == (["pay", "ship"] if end == "COMMITTED" else [])
    assert len({event.event_id for one in publishers for event in one.events}) == (end == "COMMITTED")
    (told,) = epochs(url).values()
    assert told == sorted(told) and set(told) == {1, 2}
    intact(url)


@pytest.mark.parametrize("moment", [*GOOD, *BACK, *STUCK])
async def test_a_claim_alone_shuts_the_one_before_out(sqlite_url: str, world: World, moment: str) -> None:
    """The claimant has done nothing yet but claim: already no move of the other one is recorded, be it legal or not."""
    no = refuses() if moment in [*BACK, *STUCK] else well
    stuck = raises(OSError("the bank is closed")) if moment in STUCK else well
    pause, claimed, clock = Pause(moment), Pause("tx.claim.after"), late()
    old = over(sqlite_url, *pair(world, no, undo=stuck), failpoint=pause, clock=clock)
    new = over(sqlite_url, *pair(world, no), failpoint=claimed)
    with anyio.fail_after(30):
        async with running(old), flowing(clock):
            caller = asyncio.ensure_future(ended(old))
            await pause.reached.wait()
            async with running(new):
                await claimed.reached.wait()
                before = journal(sqlite_url)
                pause.let_go.set()
                # It finds out with its next move, and then waits for the end like everybody.
                attempts = coordinator(old)._attempts
                await until(lambda: not attempts._sagas)
                assert journal(sqlite_url) == before
                claimed.let_go.set()
                assert await caller == ("COMMITTED" if moment in GOOD else "ROLLED_BACK")
    assert len(transactions(sqlite_url)) == 1
    assert world.standing() == (["pay", "ship"] if moment in GOOD else [])
    (told,) = epochs(sqlite_url).values()
    assert told == sorted(told)
    intact(sqlite_url)


async def ended(spine: Spine) -> str:
    """How the completion ended for its caller."""
    try:
        return "COMMITTED" if (await complete(spine)).is_complete else "?"
    except TransactionFailed as error:
        return error.phase


async def test_a_call_under_an_old_epoch_is_refused_by_its_number(sqlite_url: str, world: World) -> None:
    """The fencing token is in every effect: a system that remembers the highest refuses the one that came late."""
    pause, clock = Pause("call.forward.before"), late()
    old, new = over(sqlite_url, *pair(world), failpoint=pause, clock=clock), over(sqlite_url, *pair(world, refuses()))
    with anyio.fail_after(30):
        async with running(old), flowing(clock):
            caller = asyncio.ensure_future(complete(old))
            await pause.reached.wait()
            async with running(new):
                await until(lambda: transactions(sqlite_url) == ["ABORTED"])
                assert world.standing() == []
                pause.let_go.set()
                with pytest.raises(TransactionFailed):
                    await caller
    assert [effect.epoch for effect in world.effects("forward", "pay")] == [2, 1]
    assert world.standing() == []


async def test_a_spine_whose_clock_is_far_ahead_does_not_keep_a_completion_from_ending(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes each transaction over while it is driven; after a few that its owner began anew, the caller is told."""
    monkeypatch.setattr("actors.attempts.POLL_S", 0.01)
    ahead = clock(ahead_s=3600)

    async def slow(do: Any) -> Any:
        began = len(journal(sqlite_url, "tx.claimed"))
        await until(lambda: len(journal(sqlite_url, "tx.claimed")) > began)
        return do()

    behind = over(sqlite_url, Remote(world, forward=slow, attempts=1))
    hasty = over(sqlite_url, Remote(world, attempts=1), clock=ahead)
    with anyio.fail_after(30):
        async with running(behind), running(hasty), flowing(ahead):
            error = await failure(behind)
    assert (error.code, error.phase) == ("INTERRUPTED", "ROLLED_BACK")
    assert transactions(sqlite_url) == ["ABORTED"] * (ANEW_MOST + 1)
    assert world.standing() == []
    intact(sqlite_url)


async def test_what_a_spine_claims_again_and_again_in_vain_it_claims_ever_more_seldom(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives and cannot read a contract: work that is sound is not given up within seconds, and ends after all."""
    monkeypatch.setattr("actors.takeover.TICK_S", 1.0)
    moments = clock()
    spine = over(sqlite_url, Remote(world), clock=moments)
    async with running(spine):
        reader: Any = spine._system.reader  # type: ignore[union-attr]
        read = reader.contract_rows

        async def unreadable(run_id: str) -> Any:
            if world.standing():
                raise JournalUnavailable("the database is locked")
            return await read(run_id)

        reader.contract_rows = unreadable
        assert "it is not known whether" in str(await failure(spine))
        for _ in range(20):
            await moments.advance(1)
            await until(lambda: len(coordinator(spine)._takeover._known) == 0)
        # After 1, 2, 4 and 8 seconds more; every second it would have been twenty, and the end of it.
        assert 2 <= len(journal(sqlite_url, "tx.claimed")) <= 6
        reader.contract_rows = read
        await until(lambda: transactions(sqlite_url) == ["COMMITTED"], clock=moments)
    assert world.told() == ["forward pay"]
    intact(sqlite_url)
