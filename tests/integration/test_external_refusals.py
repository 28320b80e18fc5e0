"""A domain outside says no, fails, or does not answer: tried again where that helps, then undone; nobody else waits."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest

from spine import Refused, TransactionFailed
from spine.kernel.clock import VirtualClock
from spine.settings import Retry
from tests.governed import flowing, intact, journal, query, running, together, until
from tests.participants import (
    Held,
    Probed,
    Remote,
    Sender,
    World,
    acks,
    complete,
    failure,
    hang,
    loses,
    moves,
    over,
    raises,
    refuses,
    steps,
    then,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_a_refusal_is_final_and_is_undone_too(database_url: str, world: World) -> None:
    """Not tried again; the refused forward is rolled back as well, for its duplicate may still be on the way."""
    ship = Remote(world, "ship", after=["pay"], forward=refuses("NO_STOCK", "sold out"))
    spine = over(database_url, Remote(world), ship, Remote(world, "never", after=["ship"]))
    async with running(spine):
        error = await failure(spine)
        why = await spine.why("run-1")
    assert (error.code, error.failed_domain, error.phase) == ("NO_STOCK", "ship", "ROLLED_BACK")
    assert isinstance(error.cause, Refused)
    assert world.told() == ["forward pay", "forward ship", "rollback ship", "rollback pay"]
    assert moves(database_url) == [
        "begun", "intend pay", "done pay", "intend ship", "refused ship", "aborting",
        "undo ship", "undone ship", "undo pay", "undone pay", "aborted",
    ]  # fmt: skip
    assert steps(database_url) == {"pay": "ROLLED_BACK", "ship": "ROLLED_BACK", "never": "PLANNED"}
    assert acks(database_url) == [
        ("pay", "SUCCESS"),
        ("ship", "FAILED"),
        ("ship", "ROLLED_BACK"),
        ("pay", "ROLLED_BACK"),
        ("orchestrator", "FAILED"),
    ]
    assert journal(database_url, "event") == []
    assert query(database_url, "SELECT count(*) FROM incidents") == [(0,)]
    assert (why.verdict, why.cause.code) == ("rolled_back", "NO_STOCK")
    assert "ship" in why.cause.text and "sold out" in why.cause.text
    intact(database_url)


@pytest.mark.parametrize("attempts", [1, 2, 4])
async def test_a_failure_is_tried_again_as_often_as_the_domain_says(
    sqlite_url: str, world: World, attempts: int
) -> None:
    """Then it is UNKNOWN, with the error's type as code, and undone: it may have happened."""
    spine = over(sqlite_url, Remote(world, forward=loses(raises(ConnectionError("away"))), attempts=attempts))
    async with running(spine):
        error = await failure(spine)
    assert [effect.attempt for effect in world.effects("forward", "pay")] == list(range(1, attempts + 1))
    assert (error.code, error.failed_domain) == ("ConnectionError", "pay")
    assert "away" in error.message
    assert isinstance(error.cause, ConnectionError)
    assert "unknown pay" in moves(sqlite_url)
    assert world.standing() == []
    intact(sqlite_url)


@pytest.mark.parametrize("attempts", [2, 3])
async def test_an_attempt_that_succeeds_makes_good_for_those_that_failed(
    sqlite_url: str, world: World, attempts: int
) -> None:
    """Committed, nothing undone, and no trace of a failure in the result."""
    lost = loses(raises(ConnectionError("the reply was lost")))
    spine = over(sqlite_url, Remote(world, forward=then(*[lost] * (attempts - 1), well), attempts=attempts))
    async with running(spine):
        done = await complete(spine)
    assert done.all_domains_succeeded
    assert [result.error for result in done.domains] == [None] * 4
    assert len(world.effects("forward", "pay")) == attempts
    assert world.standing() == ["pay"]
    assert [move for move in moves(sqlite_url) if move.endswith("pay")] == ["intend pay", "done pay"]


@pytest.mark.parametrize("what", ["forward", "rollback"])
async def test_repeats_wait_twice_as_long_each_time_up_to_the_most(
    sqlite_url: str, world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First ``first_s``, then doubled, at most ``most_s``, each with at most a quarter of jitter on top."""
    monkeypatch.setattr("actors.takeover.TICK_S", 60.0)
    clock = VirtualClock(1_750_000_000_000_000)
    away = raises(ConnectionError("away"))
    pay = Remote(world, attempts=5, forward=away) if what == "forward" else Remote(world, rollback=away)
    no = Remote(world, "no", after=["pay"], forward=refuses() if what == "rollback" else well)
    spine = over(sqlite_url, pay, no, clock=clock, retry=Retry(attempts=5, first_s=0.1, most_s=0.5))
    async with running(spine), flowing(clock, times=10):
        with pytest.raises(TransactionFailed):
            await complete(spine)
    deadlines = [effect.deadline for effect in world.effects(what, "pay")]
    gaps = [later - sooner for sooner, later in pairwise(deadlines)]
    assert len(gaps) == 4
    for gap, least in zip(gaps, (0.1, 0.2, 0.4, 0.5), strict=True):
        # While a call fails and is looked at, the clock goes on a little.
        assert least <= gap <= least * 1.25 + 0.06, gaps


async def test_no_answer_in_time_is_tried_again_and_then_undone(sqlite_url: str, world: World) -> None:
    """Each attempt is cut off at its own deadline; the error says which domain and how long."""
    spine = over(sqlite_url, Remote(world, forward=loses(hang), timeout_s=0.05, attempts=2))
    async with running(spine):
        with anyio.fail_after(10):
            error = await failure(spine)
    assert (error.code, error.failed_domain) == ("TIMEOUT", "pay")
    assert "'pay'" in error.message and "0.05 s" in error.message
    first, second = world.effects("forward", "pay")
    assert second.deadline - first.deadline >= 0.05
    assert world.told() == ["forward pay", "forward pay", "rollback pay"]
    assert world.standing() == []
    intact(sqlite_url)


async def test_a_domain_that_will_not_be_cancelled_is_left_behind(sqlite_url: str, world: World) -> None:
    """It swallows its cancellation and acts late: by then it is rolled back, and its tombstone refuses it."""
    let_go = asyncio.Event()
    ended: list[str] = []

    async def stubborn(do: Any) -> Any:
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()
        try:
            return do()
        except Refused as refusal:
            ended.append(refusal.code)
            raise

    spine = over(sqlite_url, Remote(world, forward=stubborn, timeout_s=0.05, attempts=1))
    async with running(spine):
        with anyio.fail_after(10):
            error = await failure(spine)
        assert error.code == "TIMEOUT"
        assert "still runs" in error.message
        let_go.set()
        await until(lambda: ended)
    assert ended == ["TOMBSTONED"]
    assert world.standing() == []


@pytest.mark.parametrize(
    "raised",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), BaseException("bare"), Exception()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("what", ["forward", "rollback", "status", "post"])
async def test_whatever_a_domain_raises_is_its_own_failure(
    sqlite_url: str, world: World, what: str, raised: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends neither the loop nor the Spine, and is tried again like any other failure."""
    monkeypatch.setattr("actors.outbox.RELOAD_S", 600.0)
    bad = then(raises(raised), well)
    pay = Remote(world, forward=bad if what == "forward" else well, rollback=bad if what == "rollback" else well)
    if what == "status":
        pay = Probed(
            world, forward=refuses(), rollback=then(raises(OSError()), raises(OSError()), raises(OSError()), well)
        )

        async def status(effect: Any) -> Any:
            world.called("pay", "status", effect)
            raise raised

        pay.status = status  # type: ignore[method-assign]
    no = [Remote(world, "no", after=["pay"], forward=refuses())] if what == "rollback" else []
    spine = over(sqlite_url, pay, *no, Sender(world, post=bad if what == "post" else well))
    async with running(spine):
        if what in ("rollback", "status"):
            error = await failure(spine)
            if what == "status":
                assert error.transaction_id is not None
                await spine.retry(error.transaction_id, reason="again", actor="op")
                await until(lambda: transactions(sqlite_url) == ["ABORTED"])
        else:
            assert (await complete(spine)).is_complete
            await until(lambda: "mail" in world.standing())
        assert spine.health().ok
        assert spine.health().restarts == 0
    assert "pay" in world.standing() if what in ("forward", "post") else world.standing() == []
    intact(sqlite_url)


async def test_a_slow_domain_delays_no_other_completion(sqlite_url: str, world: World) -> None:
    """Each transaction is driven in a task of its own."""
    held = Held()

    async def by_run(do: Any) -> Any:
        effect = world.calls[-1].effect
        return await (held(do) if effect.run_id == "slow" else well(do))

    spine = over(sqlite_url, Remote(world, forward=by_run))
    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(complete, spine, "slow")
        await held.reached.wait()
        await together(*[partial(complete, spine, f"run-{n}") for n in range(10)])
        assert transactions(sqlite_url, "slow") == ["EXECUTING"]
        assert (await spine.why("slow")).verdict == "pending"
        held.let_go.set()
    assert transactions(sqlite_url, "slow") == ["COMMITTED"]


async def test_more_calls_at_once_than_are_allowed_wait_their_turn(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on calls under way costs no attempt, going forward or back: a sound domain is asked, later."""
    monkeypatch.setattr("actors.effect_calls.CALLS_MOST", 2)
    spine = over(sqlite_url, Remote(world, attempts=1))
    async with running(spine):
        done = await together(*[partial(complete, spine, f"run-{n}") for n in range(8)])
    assert all(result.is_complete for result in done)
    assert world.standing() == ["pay"] * 8
    refused = over(sqlite_url, Remote(world), Remote(world, "no", after=["pay"], forward=refuses(), attempts=1))
    async with running(refused):
        failed = await together(*[partial(failure, refused, f"refused-{n}") for n in range(8)])
    assert {error.phase for error in failed} == {"ROLLED_BACK"}
    assert not journal(sqlite_url, "tx.parked")
