"""The writer keeps its process's lease, and what is known of a process by its lease."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from spine.governance.units import StorageFailed, Unit
from spine.journal.processes import _name, lives, this_process
from spine.journal.verify import verify
from spine.journal.writer import JournalWriter
from spine.kernel.errors import JournalUnavailable
from tests.unit.journal_kit import decided, reading, sql, started, writing
from tests.unit.journal_locks import Locked

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

HOUR_US = 3_600_000_000


def leases(url: str) -> list[tuple[Any, ...]]:
    return sql(url, "SELECT instance, lease_until_at, started_at FROM instances")


async def until(true: Callable[[], Any]) -> None:
    with anyio.fail_after(10):
        while not true():
            await anyio.sleep(0.005)


async def test_a_lease_is_renewed_in_place_by_the_writer_itself_and_is_not_journaled(journal_url: str) -> None:
    """Nobody asks again: time alone moves it, once a third of it is over."""
    now = HOUR_US
    async with writing(journal_url, idle_s=0.01) as writer:
        await writer.commit([Unit("u1", [decided("d1")])])
        await writer.keep_lease("i1", 3.0, lambda: now)
        assert leases(journal_url) == [("i1", HOUR_US + 3_000_000, HOUR_US)]
        now += 999_999
        await writer.commit([Unit("u2", [started("a")])])
        assert leases(journal_url)[0][1] == HOUR_US + 3_000_000
        now += 1
        await until(lambda: leases(journal_url) == [("i1", HOUR_US + 4_000_000, HOUR_US)])
        now += 1_000_000
        await writer.commit([Unit("u3", [started("b")])])
        assert leases(journal_url) == [("i1", HOUR_US + 5_000_000, HOUR_US)]
        await writer.release_lease()
        assert leases(journal_url)[0][1] == 0
        now += HOUR_US
        await writer.commit([Unit("u4", [started("c")])])
        assert leases(journal_url)[0][1] == 0
    assert verify(journal_url).rows == 4


async def test_a_commit_does_not_wait_for_a_lease_that_cannot_be_renewed(sqlite_url: str) -> None:
    """Another process holds the lock: who wants to commit waits for it once, not once more for a renewal before."""
    now = HOUR_US
    async with writing(sqlite_url, busy_timeout_ms=2_000, idle_s=0.001) as writer:
        await writer.keep_lease("i1", 3.0, lambda: now)
        with Locked(sqlite_url):
            now += 2_000_000
            for _ in range(3):
                await anyio.sleep(0.2)
                began = time.monotonic()
                (outcome,) = await writer.commit([Unit("u1", [started("a")])])
                assert isinstance(outcome, StorageFailed)
                assert time.monotonic() - began < 3.2
        await until(lambda: leases(sqlite_url) == [("i1", HOUR_US + 5_000_000, HOUR_US)])


async def test_a_lease_that_cannot_be_taken_says_so_and_is_taken_later(sqlite_url: str) -> None:
    async with writing(sqlite_url, busy_timeout_ms=50, idle_s=0.01) as writer:
        with Locked(sqlite_url), pytest.raises(JournalUnavailable, match="lock"):
            await writer.keep_lease("i1", 3.0, lambda: HOUR_US)
        await until(lambda: leases(sqlite_url) == [("i1", HOUR_US + 3_000_000, HOUR_US)])


def test_a_lease_is_given_back_when_the_loop_that_took_it_is_closed(journal_url: str) -> None:
    """A program that forgets to stop its Spine keeps nobody from taking over."""
    writer = JournalWriter(journal_url, idle_s=0.01)

    async def take() -> None:
        await writer.open()
        await writer.keep_lease("i1", 3.0, lambda: HOUR_US)

    asyncio.run(take())
    asyncio.run(until(lambda: leases(journal_url) == [("i1", 0, HOUR_US)]))
    asyncio.run(writer.close())


@pytest.mark.parametrize(
    ("lease", "process", "dead"),
    [
        (None, None, True),
        (HOUR_US - 1, "elsewhere/1/1", True),
        (HOUR_US, "elsewhere/1/1", False),
        (HOUR_US - 1, None, True),
        (HOUR_US, None, False),
        (0, "mine", True),
        (HOUR_US - 1, "mine", False),
        (HOUR_US + 1, "gone", True),
        (HOUR_US - 1, "gone", True),
        (HOUR_US + 1, "zombie", True),
    ],
)
async def test_who_is_dead_is_known_on_this_machine_and_told_by_the_lease_on_others(
    journal_url: str, lease: int | None, process: str | None, dead: bool
) -> None:
    """A living process of this machine may be held up longer than its lease; one that gave it back is out of it."""
    with ended_child() as zombie:
        names = {"mine": this_process(), "gone": this_process() + "0", "zombie": zombie}
        async with writing(journal_url) as writer, reading(journal_url) as reader:
            await writer.commit([Unit("u1", [decided("d1")])])
            if lease is not None:
                row = ("i1", lease, names.get(process or "", process))
                sql(journal_url, "INSERT INTO instances (instance, lease_until_at, process) VALUES (?, ?, ?)", *row)
            assert [found.decision_id for found in await reader.open_decisions(HOUR_US)] == (["d1"] if dead else [])
            assert await reader.living(HOUR_US) == (set() if dead else {"i1"})


@contextmanager
def ended_child() -> Iterator[str]:
    """The name of a child that has ended and that its parent has not yet asked for its end."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
        name = _name(child.pid)
        child.kill()
        while lives(name):
            time.sleep(0.005)
        yield name
