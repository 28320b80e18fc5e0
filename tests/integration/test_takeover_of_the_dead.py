"""What a process left that was killed or frozen, another goes on with, under a higher epoch."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.governed import Published, intact, journal, running, until
from tests.integration.takeovers import epochs, pair
from tests.participants import World, complete, moves, over, refuses, transactions, well

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


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
