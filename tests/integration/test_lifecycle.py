"""A Spine's life: before the start, twice, from elsewhere, after the stop, and when start or stop are disturbed."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from spine import OperationContext, Settings, Spine
from spine.kernel.errors import ConfigurationError, JournalError, JournalUnavailable, NotRunning
from tests.governed import intact, journal, running, until

pytestmark = pytest.mark.anyio


def make(url: str, **settings: Any) -> Spine:
    spine = Spine(url, settings=Settings(**settings))

    @spine.operation("desk.quick")
    async def quick(ctx: OperationContext) -> dict[str, Any]:
        return {}

    return spine


async def health(spine: Spine) -> None:
    spine.health()


USES: list[tuple[str, Callable[[Spine], Awaitable[Any]]]] = [
    ("execute", lambda spine: spine.execute("desk.quick", tenant_id="acme")),
    ("execute, waiting", lambda spine: spine.execute("desk.quick", tenant_id="acme", wait=True)),
    ("start_run", lambda spine: spine.start_run("run-1", tenant_id="acme")),
    ("complete_run", lambda spine: spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")),
    ("why", lambda spine: spine.why("run-1")),
    ("status", lambda spine: spine.status()),
    ("flush", lambda spine: spine.flush()),
    ("bypass", lambda spine: spine.bypass(reason="why", actor="ann")),
    ("halt", lambda spine: spine.halt(reason="why", actor="ann")),
    ("health", health),
]


@pytest.mark.parametrize(("name", "use"), USES, ids=[name for name, _ in USES])
async def test_a_spine_that_does_not_run_says_so(sqlite_url: str, name: str, use: Callable[[Spine], Any]) -> None:
    """Before the start and after the stop: NotRunning, which tells the state and what to do; nothing is recorded."""
    spine = make(sqlite_url)
    with pytest.raises(NotRunning, match=r"new.*async with spine"):
        await use(spine)
    async with running(spine):
        pass
    with pytest.raises(NotRunning, match="stopped"):
        await use(spine)
    assert journal(sqlite_url) == []


async def test_starting_twice_is_refused_and_disturbs_nothing(sqlite_url: str) -> None:
    """One after the other or both at once: the second start is NotRunning, the first goes on."""
    spine = make(sqlite_url)
    ends = await asyncio.gather(spine.start(), spine.start(), return_exceptions=True)
    try:
        assert ends[0] is None
        assert isinstance(ends[1], NotRunning)
        assert "starting" in str(ends[1])
        with pytest.raises(NotRunning, match="running already"):
            await spine.start()
        assert (await spine.execute("desk.quick", tenant_id="acme")).success
    finally:
        await spine.stop()


async def test_a_stopped_spine_can_be_started_again(sqlite_url: str) -> None:
    """The declarations are kept; the journal goes on where it was."""
    spine = make(sqlite_url)
    for _ in range(3):
        async with running(spine):
            assert (await spine.execute("desk.quick", tenant_id="acme", run_id="run-1")).success
    assert len(journal(sqlite_url, "outcome")) == 3
    assert len(journal(sqlite_url, "run.started")) == 1
    intact(sqlite_url)


@pytest.mark.parametrize(("name", "use"), USES, ids=[name for name, _ in USES])
async def test_another_event_loop_is_refused(sqlite_url: str, name: str, use: Callable[[Spine], Any]) -> None:
    """A Spine belongs to the loop it was started on: another thread's loop gets NotRunning, not a hang or a mess."""
    spine = make(sqlite_url)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        async def main() -> None:
            await use(spine)

        try:
            asyncio.run(main())
        except BaseException as error:
            errors.append(error)

    async with running(spine):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        (error,) = errors
        assert isinstance(error, NotRunning)
        assert "another event loop" in str(error)
        assert (await spine.execute("desk.quick", tenant_id="acme")).success


async def test_stopping_from_another_event_loop_is_refused(sqlite_url: str) -> None:
    """It would wait on the wrong loop."""
    spine = make(sqlite_url)

    def elsewhere() -> None:
        asyncio.run(stop())

    async def stop() -> None:
        await spine.stop()

    async with running(spine):
        with pytest.raises(NotRunning, match="another event loop"):
            await anyio.to_thread.run_sync(elsewhere)
        assert spine.is_running


async def test_stop_gives_a_receipt_for_each_actor_and_may_be_called_again(sqlite_url: str) -> None:
    """All four stopped cleanly, in reverse; who stops it at the same time waits for the same, later it does nothing."""
    spine = make(sqlite_url)
    assert await spine.stop() == []
    await spine.start()
    first, second = await asyncio.gather(spine.stop(), spine.stop())
    assert [(receipt.child, receipt.end) for receipt in first] == [
        ("coordinator", "clean"),
        ("registry", "clean"),
        ("router", "clean"),
        ("audit", "clean"),
    ]
    assert second == first
    assert await spine.stop() == []
    assert not spine.is_running


async def test_an_exception_in_the_body_stops_the_spine_and_passes(sqlite_url: str) -> None:
    """``async with`` leaves nothing running behind."""
    spine = make(sqlite_url)
    with pytest.raises(KeyError, match="mine"):
        async with spine:
            raise KeyError("mine")
    assert not spine.is_running
    assert Spine.running() is None


async def test_the_running_spines_of_a_process_are_known_newest_first(sqlite_url: str, tmp_path: Path) -> None:
    """What the shims find."""
    first, second = make(sqlite_url), make(f"sqlite+aiosqlite:///{tmp_path}/other.db")
    assert Spine.running() is None
    async with running(first):
        assert Spine.running() is first
        async with running(second):
            assert Spine.running() is second
        assert Spine.running() is first
    assert Spine.running() is None


async def test_lifespan_runs_the_spine_for_an_application(sqlite_url: str) -> None:
    """``lifespan=spine.lifespan``: started before the application, stopped after it, in its state."""
    spine = make(sqlite_url)
    async with spine.lifespan(object()) as state:
        assert state == {"spine": spine}
        assert (await spine.execute("desk.quick", tenant_id="acme")).success
    assert not spine.is_running


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("sqlite+aiosqlite:////nowhere/at/all/spine.db", JournalUnavailable),
        ("sqlite+aiosqlite:///:memory:", ConfigurationError),
        ("mysql://localhost/x", ConfigurationError),
        ("not a url", ConfigurationError),
        ("postgresql+psycopg://nobody@127.0.0.1:1/none", JournalUnavailable),
    ],
)
async def test_a_start_that_fails_says_why_and_leaves_nothing_behind(url: str, error: type[Exception]) -> None:
    """The error names the database and the remedy; no thread, stream or connection stays."""
    before = threading.active_count()
    spine = make(url)
    for _ in range(2):
        with anyio.fail_after(15), pytest.raises(error):
            await spine.start()
    assert Spine.running() is None
    await until(lambda: threading.active_count() <= before)
    gc.collect()


async def test_a_start_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    """Once its cause is gone."""
    spine = make(f"sqlite+aiosqlite:///{tmp_path}/later/spine.db")
    with pytest.raises(JournalError):
        await spine.start()
    with pytest.raises(NotRunning):
        await spine.execute("desk.quick", tenant_id="acme")
    (tmp_path / "later").mkdir()
    async with running(spine):
        assert (await spine.execute("desk.quick", tenant_id="acme")).success


async def test_a_start_that_is_cancelled_leaves_nothing_behind(sqlite_url: str) -> None:
    """At whatever moment: no thread stays, and the same Spine can be started afterwards."""
    before = threading.active_count()
    for yields in range(0, 30, 3):
        spine = make(sqlite_url)
        start = asyncio.create_task(spine.start())
        for _ in range(yields):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        if start.cancelled():
            assert not spine.is_running
        else:
            await spine.stop()
        async with running(spine):
            assert (await spine.execute("desk.quick", tenant_id="acme")).success
    await until(lambda: threading.active_count() <= before)
    gc.collect()
    intact(sqlite_url)


async def test_a_stop_that_is_cancelled_goes_through_all_the_same(sqlite_url: str) -> None:
    """A half-stopped Spine would keep its thread and its files; the cancellation is passed on afterwards."""
    for yields in range(0, 20, 2):
        spine = make(sqlite_url)
        await spine.start()
        stop = asyncio.create_task(spine.stop())
        for _ in range(yields):
            await asyncio.sleep(0)
        stop.cancel()
        await asyncio.wait([stop])
        if yields:
            assert not spine.is_running
            assert spine._phase == "stopped"
        else:
            await spine.stop()
    intact(sqlite_url)


FORK = """
import asyncio, os, sys
from spine import Spine
from spine.kernel.errors import NotRunning

async def main(url):
    spine = Spine(url)

    @spine.operation("desk.quick")
    async def quick(ctx):
        return {}

    async with spine:
        assert (await spine.execute("desk.quick", tenant_id="acme")).success
        child = os.fork()
        if child == 0:
            try:
                assert Spine.running() is None
                spine.health()
            except NotRunning as error:
                os._exit(0 if "fork" in str(error) else 2)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (await spine.execute("desk.quick", tenant_id="acme")).success

asyncio.run(main(sys.argv[1]))
"""


def test_a_forked_child_does_not_use_its_parents_spine(sqlite_url: str) -> None:
    """NotRunning in the child, which says to make one there; the parent's goes on."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, sqlite_url], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(journal(sqlite_url, "outcome")) == 2
    intact(sqlite_url)


READING = """
import asyncio, gc, sys, threading
from spine.journal.reader import JournalReader

async def main(url, yields, cancel):
    reader = JournalReader(url)
    reads = [asyncio.create_task(reader.head()) for _ in range(4)]
    for _ in range(yields):
        await asyncio.sleep(0)
    if cancel:
        for read in reads:
            read.cancel()
    await reader.close()

errors = []
threading.excepthook = lambda told: errors.append(told.exc_value)
for number in range(120):
    asyncio.run(main(sys.argv[1], number % 30, number % 2))
gc.collect()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(2)
        assert not thread.is_alive(), thread
print(len(errors), errors[:2])
"""


async def test_a_reader_closed_at_any_moment_leaves_no_thread_behind(sqlite_url: str) -> None:
    """While it opens or reads, its reads cancelled or not: every thread of it ends, and none finds its loop closed."""
    async with running(make(sqlite_url)):
        pass
    with anyio.fail_after(30):
        done = await anyio.run_process([sys.executable, "-c", READING, sqlite_url], check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"0 []\n"
