"""Law 3: never half. Committed or fully compensated or visibly parked, wherever the process dies, during recovery too.

A readable few; every failpoint there is, with everything that may happen at it: ``tests/crash/test_crash_matrix.py``.
What "whole" and "undone" mean is ``tests/crash/invariants.py``; it lets the network deliver every request once more.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.invariants import check
from tests.crash.life import RUNS, Blow
from tests.crash.lives import KILLED, Lives
from tests.crash.outside import LEDGER, Services
from tests.governed import journal, query, running
from tests.participants import Remote, World, acks, complete, failure, over, refuses, steps, transactions

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    found = Lives()
    yield found
    found.close()


@pytest.fixture
async def ready(lives: Lives, sqlite_url: str, tmp_path: Path) -> str:
    """A database with the table of the application's own domain."""
    assert await asyncio.to_thread(lives.live, sqlite_url, tmp_path) == 0
    query(sqlite_url, LEDGER)
    return sqlite_url


async def killed(lives: Lives, url: str, folder: Path, *runs: str, at: str, n: int = 1) -> None:
    """A process that completes the runs, or only recovers, dies by SIGKILL at the failpoint."""
    assert await asyncio.to_thread(lives.live, url, folder, runs=runs, blow=Blow("kill", at, n)) == KILLED


async def recovered(lives: Lives, url: str, folder: Path) -> None:
    """The next process ends what is in flight; then everything is as it must be."""
    assert await asyncio.to_thread(lives.live, url, folder) == 0
    check(url, folder)


@pytest.mark.parametrize(
    ("run", "at", "n", "states"),
    [
        # What is not on the record never happened.
        ("commit-1", "tx.begin.before", 1, []),
        ("commit-1", "tx.begin.after", 1, ["COMMITTED"]),
        # The stock may be asked again, the payment only once: whether it was cannot be known.
        ("commit-1", "step.intend.after", 1, ["COMMITTED"]),
        ("commit-1", "call.forward.after", 1, ["COMMITTED"]),
        ("commit-1", "call.forward.after", 2, ["ABORTED"]),
        ("commit-1", "step.done.after", 2, ["COMMITTED"]),
        ("commit-1", "tx.commit.before", 1, ["COMMITTED"]),
        ("commit-1", "tx.commit.after", 1, ["COMMITTED"]),
        ("refuse-1", "step.refused.before", 1, ["ABORTED"]),
        ("refuse-1", "tx.abort.after", 1, ["ABORTED"]),
        ("refuse-1", "step.undo.after", 1, ["ABORTED"]),
        ("refuse-1", "call.rollback.after", 2, ["ABORTED"]),
        ("refuse-1", "tx.compensated.before", 1, ["ABORTED"]),
        ("guard-1", "tx.abort.before", 1, ["ABORTED"]),
        ("park-1", "step.park.after", 1, ["PARKED"]),
        ("park-1", "tx.park.after", 1, ["PARKED"]),
        # An operator's word that was recorded is carried out; what was not must be said again.
        ("retry-1", "tx.retry.before", 1, ["PARKED"]),
        ("retry-1", "tx.retry.after", 1, ["ABORTED"]),
        ("resolve-1", "tx.resolve.before", 1, ["PARKED"]),
        ("resolve-1", "tx.resolve.after", 1, ["ABORTED_MANUAL"]),
    ],
)
async def test_killed_on_its_way_a_completion_ends_whole_undone_or_parked(
    lives: Lives, ready: str, tmp_path: Path, run: str, at: str, n: int, states: list[str]
) -> None:
    """kill -9 at one moment of the way; the next process goes on from what is on the record."""
    await killed(lives, ready, tmp_path, run, at=at, n=n)
    await recovered(lives, ready, tmp_path)
    assert transactions(ready, run) == states


async def test_killed_again_and_again_while_it_recovers_everything_still_ends(
    lives: Lives, ready: str, tmp_path: Path
) -> None:
    """Process after process dies in the midst of recovering what the ones before it left."""
    chance = random.Random(17)
    await killed(lives, ready, tmp_path, *RUNS, at="step.undo.after", n=5)
    deaths = 0
    for _ in range(30):
        blow = Blow("kill", n=chance.randint(10, 40))
        if await asyncio.to_thread(lives.live, ready, tmp_path, blow=blow) != KILLED:
            break
        deaths += 1
        # However often: nobody is told, and nothing is published, of what has not committed.
        committed = {row["tx_id"] for row in journal(ready, "tx.committed")}
        assert {row["tx_id"] for row in journal(ready, "event")} <= committed
    assert deaths >= 4
    await recovered(lives, ready, tmp_path)
    epochs = [epoch for (epoch,) in query(ready, "SELECT epoch FROM transactions")]
    assert max(epochs) > 4


async def test_what_was_undone_stays_undone_when_the_network_delivers_late(
    lives: Lives, ready: str, tmp_path: Path
) -> None:
    """A refused request, and one that got no answer, arrive once more when the transaction is over."""
    await killed(lives, ready, tmp_path, "refuse-1", "hang-1", "break-1", at="tx.abort.after", n=3)
    await recovered(lives, ready, tmp_path)
    services = Services(tmp_path / "services")
    sent = {line["effect"] for line in services.of("sent")}
    assert len(sent) == 6
    services.late_duplicates()
    assert services.live == set()
    assert services.tombstones == sent


@pytest.mark.parametrize("at", [None, "tx.abort.after", "step.undone.after"])
async def test_what_is_acknowledged_does_not_depend_on_who_died(
    lives: Lives, ready: str, tmp_path: Path, at: str | None
) -> None:
    """A domain of the application's own refuses: its part ends as it does when nobody dies."""
    if at is None:
        assert await asyncio.to_thread(lives.live, ready, tmp_path, runs=["ledger-1"]) == 0
    else:
        await killed(lives, ready, tmp_path, "ledger-1", at=at)
    await recovered(lives, ready, tmp_path)
    assert acks(ready, "ledger") == [("ledger", "FAILED"), ("ledger", "ROLLED_BACK")]
    assert query(ready, "SELECT state FROM steps WHERE domain = 'ledger'") == [("ROLLED_BACK",)]


async def test_nothing_is_sent_before_what_undoes_it_is_on_the_record(database_url: str) -> None:
    """Each domain looks into the database as it is asked: its intent is there, and before a rollback the decision."""
    seen: list[tuple[str, str, str]] = []
    world = World()

    def looking(what: str) -> Any:
        async def behave(do: Any) -> Any:
            (found,) = query(
                database_url,
                "SELECT t.state, s.state FROM steps s JOIN transactions t ON t.tx_id = s.tx_id WHERE s.effect_id = ?",
                world.calls[-1].effect.id,
            )
            seen.append((f"{what} {world.calls[-1].domain}", *found))
            return do()

        return behave

    stock = Remote(world, "stock", forward=looking("forward"), rollback=looking("rollback"))
    pay = Remote(world, after=("stock",), forward=refuses(), rollback=looking("rollback"))
    spine = over(database_url, stock, pay)
    async with running(spine):
        assert (await failure(spine)).phase == "ROLLED_BACK"
    assert seen == [
        ("forward stock", "EXECUTING", "INTENT"),
        ("rollback pay", "COMPENSATING", "RB_INTENT"),
        ("rollback stock", "COMPENSATING", "RB_INTENT"),
    ]
    descriptors = [row["descriptor"] for row in journal(database_url, "tx.step") if row.get("move") == "intend"]
    assert len(descriptors) == 2
    assert steps(database_url) == {"stock": "ROLLED_BACK", "pay": "ROLLED_BACK"}
    assert world.live == {}


async def test_completing_again_after_an_abort_is_a_new_attempt_and_leaves_the_old_one_undone(
    database_url: str,
) -> None:
    """The second attempt has effects of its own: the first one's tombstones refuse only the first one's."""
    world = World()
    answers = [refuses(), None]

    async def forward(do: Any) -> Any:
        refusal = answers.pop(0)
        return do() if refusal is None else await refusal(do)

    spine = over(database_url, Remote(world, "stock"), Remote(world, after=("stock",), forward=forward))
    async with running(spine):
        await failure(spine)
        assert world.standing() == []
        assert (await complete(spine)).is_complete
    assert world.standing() == ["pay", "stock"]
    assert transactions(database_url) == ["ABORTED", "COMMITTED"]
    first, second = (
        {call.effect.id for call in world.calls if call.effect.tx_id == tx}
        for tx in dict.fromkeys(call.effect.tx_id for call in world.calls)
    )
    assert first.isdisjoint(second)
    assert world.tombs == first
