"""One timer for many deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spine.kernel.clock import SystemClock, VirtualClock
from spine.kernel.deadlines import Deadlines

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = pytest.mark.timeout(45, method="thread")


class Item:
    """Notes when its deadline ended it."""

    def __init__(self, clock: VirtualClock | SystemClock, moment: float) -> None:
        self.clock = clock
        self.moment = moment
        self.ended: list[float] = []

    def expire(self) -> None:
        self.ended.append(self.clock.monotonic())


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.booleans()), min_size=1, max_size=25),
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_each_ends_once_never_early_and_at_most_ten_milliseconds_late(
    added: list[tuple[int, bool]], steps: list[int]
) -> None:
    """Any mix of moments (in ms), some taken back, on any advance of the clock."""

    async def scenario() -> None:
        clock = VirtualClock()
        deadlines = Deadlines(clock)
        items = [Item(clock, moment / 1000) for moment, _ in added]
        async with anyio.create_task_group() as group:
            group.start_soon(deadlines.run)
            for item in items:
                deadlines.add(item.moment, item)
            kept = [item for item, (_, discarded) in zip(items, added, strict=True) if not discarded]
            for item in items:
                if item not in kept:
                    deadlines.discard(item.moment, item)
            assert len(deadlines) == len(kept)
            for step in steps:
                await anyio.wait_all_tasks_blocked()
                await clock.advance(step / 1000)
                await anyio.wait_all_tasks_blocked()
                now = clock.monotonic()
                for item in items:
                    due = item in kept and item.moment <= now - 0.010001
                    assert len(item.ended) <= 1
                    assert not item.ended or item in kept
                    assert not item.ended or item.moment - 1e-6 <= item.ended[0] <= item.moment + 0.010001
                    assert bool(item.ended) >= due
            group.cancel_scope.cancel()

    anyio.run(scenario)


@pytest.mark.anyio
async def test_an_earlier_deadline_added_later_does_not_wait_for_the_first() -> None:
    """The sleeping timer is woken when something nearer comes."""
    clock = VirtualClock()
    deadlines = Deadlines(clock)
    late, soon = Item(clock, 60.0), Item(clock, 0.5)
    async with anyio.create_task_group() as group:
        group.start_soon(deadlines.run)
        deadlines.add(late.moment, late)
        await anyio.wait_all_tasks_blocked()
        deadlines.add(soon.moment, soon)
        await anyio.wait_all_tasks_blocked()
        await clock.advance(1.0)
        await anyio.wait_all_tasks_blocked()
        assert len(soon.ended) == 1
        assert late.ended == []
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_deadlines_are_served_in_real_time_too() -> None:
    clock = SystemClock()
    deadlines = Deadlines(clock)
    done = anyio.Event()

    class Signal:
        def expire(self) -> None:
            done.set()

    async with anyio.create_task_group() as group:
        group.start_soon(deadlines.run)
        began = clock.monotonic()
        deadlines.add(began + 0.03, Signal())
        with anyio.fail_after(5):
            await done.wait()
        assert clock.monotonic() - began >= 0.03
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_ending_one_may_add_and_take_back_others_of_the_same_moment() -> None:
    clock = VirtualClock()
    deadlines = Deadlines(clock)
    after = Item(clock, 2.0)

    class First:
        def expire(self) -> None:
            deadlines.discard(1.0, neighbour)
            deadlines.add(after.moment, after)

    neighbour, first = Item(clock, 1.0), First()
    async with anyio.create_task_group() as group:
        group.start_soon(deadlines.run)
        deadlines.add(1.0, first)
        deadlines.add(1.0, neighbour)
        await anyio.wait_all_tasks_blocked()
        await clock.advance(1.5)
        await anyio.wait_all_tasks_blocked()
        await clock.advance(1.0)
        await anyio.wait_all_tasks_blocked()
        assert len(after.ended) == 1
        group.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_deadline_taken_back_leaves_nothing_behind() -> None:
    clock = VirtualClock()
    deadlines = Deadlines(clock)
    for number in range(1000):
        item = Item(clock, 30.0 + number)
        deadlines.add(item.moment, item)
        deadlines.discard(item.moment, item)
    assert len(deadlines) == 0


class Limited:
    """A task whose work has 2 virtual seconds; ``ended`` tells how it ended."""

    def __init__(self, work: Callable[[], Awaitable[object]]) -> None:
        self.clock = VirtualClock()
        self.deadlines = Deadlines(self.clock)
        self.work = work
        self.ended: list[str] = []

    async def run(self) -> None:
        try:
            with self.deadlines.limit(2):
                await self.work()
        except TimeoutError:
            self.ended.append("late")
            # The task itself goes on, and can wait again.
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("over")

    async def after(self, *steps: float, cancel: bool = False) -> list[str]:
        async with anyio.create_task_group() as group:
            group.start_soon(self.deadlines.run)
            task = asyncio.create_task(self.run())
            await anyio.wait_all_tasks_blocked()
            for step in steps:
                await self.clock.advance(step)
                await anyio.wait_all_tasks_blocked()
            if cancel:
                task.cancel()
            await asyncio.wait([task], timeout=5)
            assert task.done()
            assert task.cancelled() == cancel
            assert task.cancelling() == (1 if cancel else 0)
            group.cancel_scope.cancel()
        assert len(self.deadlines) == 0
        return self.ended


@pytest.mark.anyio
async def test_a_limited_piece_of_work_that_ends_in_time_is_left_alone() -> None:
    assert await Limited(lambda: asyncio.sleep(0)).after(10) == ["over"]


@pytest.mark.anyio
async def test_a_limited_piece_of_work_is_ended_at_its_moment_and_the_task_goes_on() -> None:
    limited = Limited(lambda: asyncio.Event().wait())
    assert await limited.after(1.5, 0.6) == ["late", "over"]


@pytest.mark.anyio
async def test_somebody_elses_cancellation_is_not_taken_for_the_limit() -> None:
    assert await Limited(lambda: asyncio.Event().wait()).after(1, cancel=True) == ["cancelled"]


@pytest.mark.anyio
async def test_who_swallows_the_cancellation_is_cancelled_again() -> None:
    async def stubborn() -> None:
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue
        await asyncio.Event().wait()

    limited = Limited(stubborn)
    assert await limited.after(2.1, 1, 1, 1) == ["late", "over"]


@pytest.mark.anyio
async def test_a_cancellation_at_the_moment_of_the_limit_is_not_lost() -> None:
    """The limit has cancelled the task, which has not run since, when somebody else cancels it too."""
    limited = Limited(lambda: asyncio.Event().wait())
    task = asyncio.create_task(limited.run())
    await asyncio.sleep(0)
    await limited.clock.advance(3)
    limited.deadlines._expire(3)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert limited.ended == ["cancelled"]
    assert len(limited.deadlines) == 0
