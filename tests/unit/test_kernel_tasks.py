"""Owned tasks: bounded, ended with their owner, nothing swallowed."""

from __future__ import annotations

import asyncio
import time

import anyio
import anyio.lowlevel
import pytest

from spine.kernel.clock import SystemClock
from spine.kernel.errors import Overloaded
from spine.kernel.tasks import Tasks
from tests.stubborn import swallow_cancellation

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(45, method="thread")]


def owned(limit: int = 8) -> tuple[Tasks, list[tuple[str, BaseException]]]:
    crashed: list[tuple[str, BaseException]] = []
    return Tasks("registry", limit=limit, on_crash=lambda name, error: crashed.append((name, error))), crashed


async def test_at_most_so_many_run_at_a_time_and_the_next_one_is_refused_by_name() -> None:
    tasks, _ = owned(2)
    gate = anyio.Event()
    for _ in range(2):
        tasks.spawn(gate.wait())
    with pytest.raises(Overloaded, match="registry runs 2 tasks already"):
        tasks.spawn(gate.wait())
    gate.set()
    assert await tasks.drained(5)
    tasks.spawn(gate.wait())
    assert await tasks.drained(5)


async def test_a_task_that_raises_is_told_to_its_owner_with_its_name() -> None:
    tasks, crashed = owned()

    async def work() -> None:
        raise KeyError("k")

    tasks.spawn(work(), "sweep")
    assert await tasks.drained(5)
    await asyncio.sleep(0)
    ((name, error),) = crashed
    assert name == "sweep"
    assert isinstance(error, KeyError)
    assert len(tasks) == 0


async def test_a_cancelled_task_is_not_a_crash() -> None:
    tasks, crashed = owned()
    task = tasks.spawn(anyio.sleep_forever())
    await anyio.wait_all_tasks_blocked()
    task.cancel()
    assert await tasks.drained(5)
    assert crashed == []


async def test_draining_waits_for_what_tasks_start_meanwhile() -> None:
    tasks, _ = owned()
    done: list[int] = []

    async def work(left: int) -> None:
        await anyio.lowlevel.checkpoint()
        if left:
            tasks.spawn(work(left - 1))
        done.append(left)

    tasks.spawn(work(3))
    assert await tasks.drained(5)
    assert sorted(done) == [0, 1, 2, 3]


async def test_draining_and_cancelling_give_up_in_time_and_say_so() -> None:
    tasks, _ = owned()
    release = asyncio.Event()

    tasks.spawn(swallow_cancellation(release))
    tasks.spawn(anyio.sleep_forever())
    began = time.monotonic()
    assert not await tasks.drained(0.05)
    assert not await tasks.cancel(0.05)
    assert time.monotonic() - began < 3
    assert len(tasks) == 1
    release.set()
    assert await tasks.drained(5)


async def test_who_looks_again_and_again_stops_looking_when_it_is_cancelled() -> None:
    """The look under way ends too: it must begin nothing while its owner stops."""
    tasks, crashed = owned()
    looking, ended = asyncio.Event(), asyncio.Event()

    async def look() -> None:
        looking.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    keeper = tasks.spawn(tasks.every(1.0, look, "look", SystemClock()))
    await looking.wait()
    keeper.cancel()
    assert await tasks.drained(5)
    assert ended.is_set() and not crashed


async def test_a_look_that_fails_ends_alone() -> None:
    """The next one comes all the same."""
    tasks, crashed = owned()
    looks = 0
    again = asyncio.Event()

    async def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ValueError("unreadable")
        again.set()

    keeper = tasks.spawn(tasks.every(0.0, look, "look", SystemClock()))
    with anyio.fail_after(5):
        await again.wait()
    keeper.cancel()
    assert await tasks.drained(5)
    assert [name for name, _ in crashed] == ["look"]
