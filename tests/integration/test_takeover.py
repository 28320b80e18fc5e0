"""Several Spines on one database: what one cannot go on with another does, and never two at once."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from spine import Spine, TransactionFailed
from spine.kernel.clock import VirtualClock
from tests.governed import Published, clock, flowing, intact, journal, query, running, together, until
from tests.participants import (
    Behaviour,
    Held,
    Pause,
    Remote,
    World,
    complete,
    coordinator,
    hang,
    loses,
    moves,
    over,
    raises,
    refuses,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


def pair(world: World, ship: Behaviour = well, *, undo: Behaviour = well, attempts: int = 3) -> list[Remote]:
    """A payment, and a parcel after it."""
    return [
        Remote(world, "pay", rollback=undo, attempts=attempts),
        Remote(world, "ship", after=["pay"], forward=ship, attempts=attempts),
    ]


def epochs(url: str) -> dict[str, list[int]]:
    """The fencing tokens under which each transaction's records were written, in journal order."""
    found: dict[str, list[int]] = {}
    for body in journal(url):
        if body["kind"].startswith("tx.") and body["kind"] != "tx.refused":
            found.setdefault(body["tx_id"], []).append(body["epoch"])
    return found


# -- a process that is dead


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for one in started:
        one.kill()
        one.communicate()


class Other:
    """Another process, and what it says."""

    def __init__(
        self,
        processes: list[subprocess.Popen[str]],
        url: str,
        effects: Path,
        stands_at: str,
        refusing: str,
        lease: float,
    ) -> None:
        arguments = [url, str(effects), stands_at, refusing, str(lease)]
        self.effects = effects
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.integration.saga_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        processes.append(self.process)

    async def says(self, word: str) -> Any:
        assert self.process.stdout is not None
        while True:
            line = await asyncio.to_thread(self.process.stdout.readline)
            assert line, "it ended"
            if line.startswith("{") and word in (said := json.loads(line)):
                return said

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")

    def to(self, world: World) -> None:
        """Give the systems outside what it did to them."""
        for call in map(json.loads, self.effects.read_text().splitlines()):
            world.epochs[call["tx_id"]] = call["epoch"]
            if call["what"] == "rollback":
                world.tombs.add(call["id"])
                world.live.pop(call["id"], None)
            elif not call["refused"]:
                world.live[call["id"]] = call["domain"]


@pytest.mark.parametrize(
    ("stands_at", "refusing", "end"),
    [("forward ship", "none", "COMMITTED"), ("rollback pay", "ship", "ABORTED")],
)
async def test_what_a_killed_process_left_is_gone_on_with(
    database_url: str,
    world: World,
    tmp_path: Path,
    processes: list[subprocess.Popen[str]],
    stands_at: str,
    refusing: str,
    end: str,
) -> None:
    """A Spine beside it leaves it alone while it lives, and takes over under a higher epoch once it is dead."""
    other = Other(processes, database_url, tmp_path / "effects", stands_at, refusing, 600)
    publisher = Published()
    spine = over(database_url, *pair(world, refuses() if refusing == "ship" else well), publisher=publisher)
    with anyio.fail_after(40):
        await other.says("stands_at")
        async with running(spine):
            await until(lambda: spine.health().transactions["in_flight"] == 1)
            # Its lease is long and it lives: whoever looks at it now only looks.
            for _ in range(5):
                await asyncio.sleep(0.02)
            assert journal(database_url, "tx.claimed") == []
            assert world.calls == []
            before = len(moves(database_url))
            other.process.kill()
            await asyncio.to_thread(other.process.wait)
            other.to(world)
            await until(lambda: transactions(database_url) == [end])
            await until(lambda: spine.health().transactions["recovered"] == 1)
            if end == "COMMITTED":
                assert (await complete(spine)).is_complete
                await until(lambda: publisher.events)
                assert (await spine.why("run-1")).verdict == "succeeded"
            else:
                assert (await spine.why("run-1")).verdict == "rolled_back"
    # What was done is not done again, what was under way is, under the new epoch.
    assert [(str(call), call.effect.epoch) for call in world.calls] == [(stands_at, 2)]
    intents = [body for body in journal(database_url, "tx.step") if body.get("move") == "intend"]
    intended = {body["effect_id"]: body["descriptor"] for body in intents}
    assert [call.effect.descriptor for call in world.calls] == [intended[call.effect.id] for call in world.calls]
    assert world.standing() == (["pay", "ship"] if end == "COMMITTED" else [])
    assert moves(database_url)[before] == "claimed"
    (told,) = epochs(database_url).values()
    assert told == sorted(told)
    assert set(told) == {1, 2}
    (claimed,) = journal(database_url, "tx.claimed")
    (begun,) = journal(database_url, "tx.begun")
    assert (claimed["previous"], claimed["epoch"]) == (begun["instance"], 2)
    intact(database_url)


async def test_a_process_that_was_frozen_finds_its_transaction_taken(
    sqlite_url: str, world: World, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """SIGSTOP until its lease is over: another one goes on; thawed, it changes nothing and tells its caller the end."""
    other = Other(processes, sqlite_url, tmp_path / "effects", "forward ship", "none", 3.5)
    spine = over(sqlite_url, *pair(world))
    with anyio.fail_after(40):
        await other.says("stands_at")
        async with running(spine):
            other.process.send_signal(signal.SIGSTOP)
            try:
                other.to(world)
                await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
                before = journal(sqlite_url)
            finally:
                other.process.send_signal(signal.SIGCONT)
            other.tell()
            told = await other.says("ended")
    assert told["ended"] in ("COMMITTED", "EVENTS_PUBLISHED")
    assert [body["tx_id"] for body in journal(sqlite_url, "tx.begun")] == [told["tx_id"]]
    ours = [body for body in journal(sqlite_url)[len(before) :] if body["kind"].startswith("tx.")]
    assert ours == []
    assert [(str(call), call.effect.epoch) for call in world.calls] == [("forward ship", 2)]
    intact(sqlite_url)


# -- one that lives, but whose lease is over


def late(minutes: float = 10) -> VirtualClock:
    """The clock of a Spine whose lease was over long ago, as everybody else sees it."""
    return clock(ahead_s=-60 * minutes)


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


# -- who takes over


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
    assert (why.verdict, why.cause.code) == ("rolled_back", "INTERRUPTED")
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
