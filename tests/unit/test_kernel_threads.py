"""Daemon threads for blocking calls."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable

import anyio
import anyio.from_thread
import pytest

from spine.kernel.threads import IDLE_MOST, Threads

pytestmark = pytest.mark.anyio

NAME = "test-threads"


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not true():
            await anyio.sleep(0.002)


@pytest.fixture
async def threads() -> AsyncIterator[Threads]:
    """Closed afterwards: then no thread is left."""
    made = Threads(NAME)
    yield made
    made.close()
    await until(lambda: not alive())


async def test_a_call_gives_its_result_or_its_error(threads: Threads) -> None:
    """Off the loop's thread, in a copy of the caller's context."""
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("caller's")

    def work() -> tuple[int, str]:
        seen = variable.get()
        variable.set("thread's")
        return threading.get_ident(), seen

    ident, seen = await threads.run(work)
    assert ident != threading.get_ident()
    assert (seen, variable.get()) == ("caller's", "caller's")
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        await threads.run(lambda: (_ for _ in ()).throw(SystemExit(3)))


async def test_a_call_that_raises_stop_iteration_ends(threads: Threads) -> None:
    """No future takes StopIteration: it comes as the RuntimeError that a generator makes of it."""
    with anyio.fail_after(5), pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(lambda: next(iter(())))


async def test_every_call_begins_at_once_and_idle_threads_are_used_again(threads: Threads) -> None:
    """As many threads as calls at one time, all daemons; the next calls make no more."""
    leave = threading.Event()
    calls = [threads.run(lambda: leave.wait(30)) for _ in range(5)]
    await until(lambda: len(alive()) == 5)
    assert all(thread.daemon for thread in alive())
    leave.set()
    await asyncio.gather(*calls)
    before = set(alive())
    assert await asyncio.gather(*(threads.run(threading.get_ident) for _ in range(5)))
    assert set(alive()) == before


async def test_only_so_many_idle_threads_are_kept(threads: Threads) -> None:
    """A burst does not leave its threads behind for ever."""
    barrier = threading.Barrier(IDLE_MOST + 5)
    await asyncio.gather(*(threads.run(barrier.wait) for _ in range(IDLE_MOST + 5)))
    await until(lambda: len(alive()) == IDLE_MOST)


async def test_a_call_nobody_waits_for_any_more_goes_on_and_its_thread_ends_with_it(threads: Threads) -> None:
    """Cancelling the wait or closing does not end it; a thread freed after the close does not stay."""
    leave, ended = threading.Event(), threading.Event()

    def work() -> None:
        leave.wait(30)
        ended.set()

    waiting = threads.run(work)
    waiting.cancel()
    threads.close()
    assert len(alive()) == 1
    leave.set()
    await until(ended.is_set)
    await until(lambda: not alive())


async def test_anyio_leads_back_to_the_loop(threads: Threads) -> None:
    """From within a call, as from anyio's own worker threads."""

    async def on_the_loop(value: int) -> tuple[int, int]:
        return threading.get_ident(), value

    def work() -> tuple[int, int]:
        anyio.from_thread.check_cancelled()
        return anyio.from_thread.run(on_the_loop, 3)

    assert await threads.run(work) == (threading.get_ident(), 3)


def test_a_thread_ends_with_its_call_even_when_its_loop_has_stopped() -> None:
    """Closed and stopped, but open still: nothing runs there any more that could tell the thread to go."""
    leave = threading.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        threads = Threads(NAME)
        threads.run(lambda: leave.wait(30))
        threads.close()

    loop.run_until_complete(main())
    (thread,) = alive()
    leave.set()
    thread.join(10)
    assert not thread.is_alive()
    loop.close()


def test_a_call_that_outlives_its_loop_disturbs_nobody() -> None:
    """Its result has nowhere to go; its thread ends quietly."""
    leave = threading.Event()

    async def main() -> None:
        Threads(NAME).run(lambda: leave.wait(30))

    asyncio.run(main())
    (thread,) = alive()
    leave.set()
    thread.join(10)
    assert not thread.is_alive()
