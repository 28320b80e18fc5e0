"""Of the Spines that could take a transaction over exactly one does, if it has the domains; all callers get one end."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import anyio
import pytest

from spine import TransactionFailed
from tests.governed import flowing, intact, journal, query, running, together, until
from tests.integration.takeovers import epochs, late, pair
from tests.participants import (
    Held,
    Remote,
    World,
    complete,
    coordinator,
    hang,
    loses,
    moves,
    over,
    refuses,
    transactions,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def strand(url: str, world: World, *, attempts: int = 3) -> None:
    """Leave a transaction in flight: its payment made, its parcel under way, its Spine dead to everybody."""
    held = Held()
    clock = late()
    spine = over(url, *pair(world, held, attempts=attempts), clock=clock, drain_s=0.01)
    await spine.start()
    caller = asyncio.ensure_future(complete(spine))
    await held.reached.wait()
    saga = next(iter(coordinator(spine)._attempts._sagas.values()))
    # As if it ended here: nothing it still does reaches the journal.
    saga._own.recorder.commit = hang  # type: ignore[method-assign]
    saga._write = hang  # type: ignore[method-assign]
    caller.cancel()
    await asyncio.wait([caller])
    await spine.stop()


async def test_a_spine_without_the_domains_leaves_a_transaction_to_one_that_has_them(
    sqlite_url: str, world: World
) -> None:
    """Neither one without domains nor one with some of them touches it; one that declares all of them ends it."""
    await strand(sqlite_url, world)
    before = moves(sqlite_url)
    bare, half = over(sqlite_url), over(sqlite_url, Remote(world, "pay"))
    async with running(bare, half):
        await until(lambda: all(spine.health().transactions["in_flight"] == 1 for spine in (bare, half)))
        assert (await complete(bare, "run-2")).is_complete
        assert (await complete(half, "run-3")).is_complete
        for _ in range(10):
            await asyncio.sleep(0.02)
        assert moves(sqlite_url) == before
        assert (await bare.why("run-1")).verdict == "pending"
        whole = over(sqlite_url, *pair(world))
        async with running(whole):
            await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
            await until(lambda: bare.health().transactions["in_flight"] == 0)
    assert [body["epoch"] for body in journal(sqlite_url, "tx.claimed")] == [2]
    intact(sqlite_url)


async def test_of_many_that_could_take_over_exactly_one_does(database_url: str, world: World) -> None:
    """Four Spines start at once over ten stranded transactions: each is claimed once and driven by one of them."""
    held: list[Held] = []

    async def each_held(do: Any) -> Any:
        held.append(Held())
        return await held[-1](do)

    clock = late()
    first = over(database_url, *pair(world, each_held), clock=clock, drain_s=0.01)
    others = [over(database_url, *pair(world)) for _ in range(4)]
    with anyio.fail_after(40):
        async with running(first), anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(complete, first, f"run-{number}")
            await until(lambda: len(held) == 10 and all(one.reached.is_set() for one in held))
            async with running(*others), flowing(clock):
                await until(lambda: sum(spine.health().transactions["recovered"] for spine in others) == 10)
                for one in held:
                    one.let_go.set()
                # Whoever began them is told what the others made of them.
                await until(lambda: first.health().messages.in_flight == 0)
    assert [body["epoch"] for body in journal(database_url, "tx.claimed")] == [2] * 10
    assert query(database_url, "SELECT DISTINCT state FROM transactions") == [("COMMITTED",)]
    again = [effect for effect in world.effects("forward", "ship") if effect.epoch == 2]
    assert len(again) == len({effect.id for effect in again}) == 10
    assert {effect.epoch for effect in world.effects("forward", "pay")} == {1}
    assert all(told == sorted(told) for told in epochs(database_url).values())
    intact(database_url)


async def test_whose_transactions_are_stolen_all_the_time_still_ends_each_once(sqlite_url: str, world: World) -> None:
    """One Spine is always taken for dead; twenty of its completions, a third of them refused, are each ended once."""

    async def by_run(do: Any) -> Any:
        effect = world.calls[-1].effect
        number = int(effect.run_id)
        if number % 4 == 1 and effect.epoch == 1:
            await until(
                lambda: query(sqlite_url, "SELECT epoch FROM transactions WHERE tx_id = ?", effect.tx_id) > [(1,)]
            )
        if number % 3 == 0:
            return await refuses()(do)
        return do()

    clock = late()
    old, new = over(sqlite_url, *pair(world, by_run), clock=clock), over(sqlite_url, *pair(world, by_run))
    ended: dict[int, str] = {}

    async def one(number: int) -> None:
        try:
            ended[number] = "COMMITTED" if (await complete(old, str(number))).is_complete else "?"
        except TransactionFailed as error:
            ended[number] = f"{error.phase} {error.code}"

    with anyio.fail_after(40):
        async with running(old, new), flowing(clock):
            await together(*[partial(one, number) for number in range(20)])
    assert ended == {n: "COMMITTED" if n % 3 else "ROLLED_BACK NO_FUNDS" for n in range(20)}
    states = dict(query(sqlite_url, "SELECT run_id, state FROM transactions"))
    assert len(query(sqlite_url, "SELECT 1 FROM transactions")) == 20
    assert states == {str(n): "COMMITTED" if n % 3 else "ABORTED" for n in range(20)}
    assert world.standing() == sorted(["pay", "ship"] * len([n for n in range(20) if n % 3]))
    assert len(journal(sqlite_url, "tx.claimed")) >= 5
    for told in epochs(sqlite_url).values():
        assert told == sorted(told)
    intact(sqlite_url)


async def test_a_takeover_that_is_itself_taken_over_counts_up(sqlite_url: str, world: World) -> None:
    """Each driver has a number of its own; attempts that were spent by the dead are not given again."""
    holds = [Held(loses(hang)) for _ in range(3)]
    spines = []
    with anyio.fail_after(30):
        for number, held in enumerate(holds):

            async def stuck(do: Any, held: Held = held) -> Any:
                held.reached.set()
                await hang(do)

            spines.append(over(sqlite_url, *pair(world, stuck, attempts=2), clock=late(10 - number), drain_s=0.01))
        async with running(spines[0]):
            caller = asyncio.ensure_future(complete(spines[0]))
            await holds[0].reached.wait()
            async with running(spines[1]), flowing(spines[1]._settings.clock):  # type: ignore[arg-type]
                await holds[1].reached.wait()
                last = over(sqlite_url, *pair(world, attempts=2))
                async with running(last):
                    await until(lambda: transactions(sqlite_url) == ["ABORTED"])
                    why = await last.why("run-1")
                caller.cancel()
                await asyncio.wait([caller])
    assert [effect.epoch for effect in world.effects("forward", "ship")] == [1, 2]
    assert [effect.attempt for effect in world.effects("forward", "ship")] == [1, 2]
    assert [body["epoch"] for body in journal(sqlite_url, "tx.claimed")] == [2, 3]
    # Two ended there: it is the domain's doing, and not begun anew by itself.
    assert (why.verdict, why.cause.code) == ("rolled_back", "STALLED")
    assert [body["interrupted"] for body in journal(sqlite_url, "tx.aborting", "tx.aborted")] == [False, False]
    assert world.standing() == []
    intact(sqlite_url)


async def test_callers_elsewhere_wait_for_the_one_that_takes_over(sqlite_url: str, world: World) -> None:
    """A Spine that has not got the domains is asked to complete the same run: it waits and gives the common result."""
    await strand(sqlite_url, world)
    bare = over(sqlite_url)
    async with running(bare):
        waiting = asyncio.ensure_future(complete(bare))
        await until(lambda: bare.health().messages.in_flight)
        whole = over(sqlite_url, *pair(world))
        async with running(whole):
            with anyio.fail_after(10):
                done = await waiting
            assert done.transaction_id == (await complete(whole)).transaction_id
    assert transactions(sqlite_url) == ["COMMITTED"]
    assert done.is_complete
