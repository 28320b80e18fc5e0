"""The threads that read: cancelled, overtaken, locked out, their file gone, closed at work, forked; nothing is left."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

import spine.journal.reading
import spine.journal.scans
from spine.journal.engine import parse_url
from spine.journal.reader import JournalReader
from spine.journal.thread import Worker
from spine.kernel.errors import JournalUnavailable
from tests.unit.journal_kit import all_committed, day, reading, sql, write

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
async def reader(journal_url: str) -> AsyncIterator[JournalReader]:
    assert all_committed(await write(journal_url, day()))
    async with reading(journal_url) as found:
        yield found


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("spine-journal")]


async def threads_gone() -> None:
    with_deadline = time.monotonic() + 10
    while threads():
        assert time.monotonic() < with_deadline, threads()
        await asyncio.sleep(0.01)


def held(path: Path) -> list[str]:
    """The open files of this process that belong to the database."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:
            continue
    return [name for name in found if name.startswith(str(path))]


async def test_many_lookups_at_once_each_get_their_own_answer_or_error(reader: JournalReader) -> None:
    found = await asyncio.gather(
        *(reader.run(f"run-{n % 4}") if n % 10 else reader._all("SELECT nothing") for n in range(200)),
        return_exceptions=True,
    )
    for n, answer in enumerate(found):
        if n % 10 == 0:
            assert isinstance(answer, JournalUnavailable)
        elif n % 4 == 3:
            assert answer is None
        else:
            assert not isinstance(answer, BaseException)
            assert answer is not None
            assert answer.run_id == f"run-{n % 4}"


async def test_a_cancelled_lookup_is_forgotten_and_the_next_one_answered(reader: JournalReader) -> None:
    await reader.open()
    waiting = [asyncio.create_task(reader.run("run-1")) for _ in range(50)]
    await asyncio.sleep(0)
    for task in waiting[::2]:
        task.cancel()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in found] == [True, False] * 25
    assert (await reader.run("run-1")) is not None


async def test_a_long_scan_holds_up_no_lookup(reader: JournalReader) -> None:
    scan = asyncio.create_task(reader._scan(ENDLESS))
    for _ in range(20):
        assert (await asyncio.wait_for(reader.run("run-1"), 5)) is not None
    assert not scan.done()
    scan.cancel()


async def test_a_query_that_takes_too_long_is_given_up_and_the_thread_is_free_again(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal_url, day())
    monkeypatch.setattr(spine.journal.reading, "_READ_S", 0.5)
    async with reading(journal_url) as reader:
        await reader.open()
        with pytest.raises(JournalUnavailable, match=r"0\.5 s|interrupted|timeout"):
            await reader._all(ENDLESS)
        monkeypatch.setattr(spine.journal.reading, "_READ_S", 5)
        assert (await reader.run("run-1")) is not None


async def test_what_waits_behind_a_query_that_takes_too_long_is_told_in_time(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal_url, day())
    async with reading(journal_url) as reader:
        await reader.open()
        monkeypatch.setattr(spine.journal.reading, "_READ_S", 2)
        blocking = asyncio.create_task(reader._all(ENDLESS))
        await asyncio.sleep(0)
        monkeypatch.setattr(spine.journal.reading, "_READ_S", 0.2)
        began = time.monotonic()
        with pytest.raises(JournalUnavailable, match=r"journal reader gave no answer within 0\.2 s"):
            await reader.run("run-1")
        assert time.monotonic() - began < 1.5
        with pytest.raises(JournalUnavailable):
            await blocking


async def test_closing_answers_what_waits(reader: JournalReader) -> None:
    waiting = [asyncio.create_task(reader.run("run-1")) for _ in range(100)]
    await asyncio.sleep(0)
    await reader.close()
    assert all(run is not None for run in await asyncio.gather(*waiting))
    await threads_gone()


async def test_closing_interrupts_what_takes_too_long_and_leaves_nothing(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(journal_url, day())
    monkeypatch.setattr(spine.journal.reading, "_CLOSE_S", 0.5)
    monkeypatch.setattr(spine.journal.scans, "_CLOSE_S", 0.5)
    path = parse_url(journal_url).path
    reader = JournalReader(journal_url)
    await reader.open()
    waiting = [asyncio.create_task(query) for query in (reader._all(ENDLESS), reader.run("run-1"), reader.tail(0))]
    waiting.append(asyncio.create_task(reader._scan(ENDLESS)))
    await asyncio.wait([waiting[2]])
    assert path is None or held(path)
    began = time.monotonic()
    await reader.close()
    await threads_gone()
    assert time.monotonic() - began < 5
    assert path is None or held(path) == []
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in found] == [JournalUnavailable, JournalUnavailable, list, JournalUnavailable]


async def test_after_closing_it_can_be_asked_again(reader: JournalReader) -> None:
    for _ in range(2):
        assert (await reader.run("run-1")) is not None
        assert len(await reader.tail(0)) == 31
        await reader.close()
        await reader.close()
    await threads_gone()


async def test_a_closing_that_is_cancelled_still_ends_the_threads(reader: JournalReader) -> None:
    await reader.run("run-1")
    closing_it = asyncio.create_task(reader.close())
    await asyncio.sleep(0)
    closing_it.cancel()
    await asyncio.wait([closing_it])
    await threads_gone()


def test_a_loop_that_ends_in_the_middle_of_a_query_leaves_nothing_behind(sqlite_url: str) -> None:
    reader = JournalReader(sqlite_url)

    async def main() -> None:
        await write(sqlite_url, day())
        await reader.run("run-1")
        waiting = asyncio.create_task(reader._all(ENDLESS))
        await asyncio.sleep(0)
        waiting.cancel()
        reader._lookups._opened[1].interrupt()  # type: ignore[index]
        await reader.close()

    asyncio.run(main())
    asyncio.run(threads_gone())


async def test_a_locked_database_is_named_and_read_again_once_it_is_free(sqlite_url: str) -> None:
    await write(sqlite_url, day())
    async with reading(sqlite_url) as reader:
        assert (await reader.run("run-1")) is not None
        with closing(sqlite3.connect(parse_url(sqlite_url).file(), isolation_level=None)) as other:
            other.execute("PRAGMA locking_mode=EXCLUSIVE")
            await reader.close()
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(JournalUnavailable, match="locked"):
                await reader.run("run-1")
        assert (await reader.run("run-1")) is not None


async def test_a_removed_file_is_not_read_on_and_one_put_back_is(sqlite_url: str) -> None:
    await write(sqlite_url, day())
    path = parse_url(sqlite_url).file()
    async with reading(sqlite_url) as reader:
        assert (await reader.run("run-1")) is not None
        path.rename(path.with_name("elsewhere"))
        with pytest.raises(JournalUnavailable, match="the database file is gone"):
            await reader.run("run-1")
        with pytest.raises(JournalUnavailable, match="there is no journal"):
            await reader.run("run-1")
        assert held(path.with_name("elsewhere")) == []
        path.with_name("elsewhere").rename(path)
        assert (await reader.run("run-1")) is not None


async def test_a_file_that_was_replaced_is_refused_until_it_is_opened_anew(sqlite_url: str) -> None:
    """Lookups and scans are of one mind about which file it is, in every order and after closing too."""
    await write(sqlite_url, day())
    path = parse_url(sqlite_url).file()
    await write(f"{sqlite_url}-new", day(1))
    async with reading(sqlite_url) as reader:
        assert (await reader.run("run-1")) is not None
        assert "run-1" in [run.run_id for run in await reader.runs()]
        path.with_name(path.name + "-new").replace(path)
        for _ in range(2):
            with pytest.raises(JournalUnavailable, match="replaced by another one"):
                await reader.run("run-1")
            with pytest.raises(JournalUnavailable, match="replaced by another one"):
                await reader.runs()
        await reader.close()
        assert (await reader.run("run-1")) is None
        assert (await reader.run("run-0")) is not None
        assert [run.run_id for run in await reader.runs()] == ["run-0"]


@pytest.mark.postgresql
async def test_a_connection_the_server_dropped_is_made_again_unseen(journal_postgresql_url: str) -> None:
    await write(journal_postgresql_url, day())
    async with reading(journal_postgresql_url) as reader:
        for _ in range(2):
            ((backend,),) = await reader._all("SELECT pg_backend_pid()")
            sql(journal_postgresql_url, "SELECT pg_terminate_backend(?, 5000)", backend)
            assert (await reader.run("run-1")) is not None


FORK = """
import asyncio, os, sys
from spine.journal.processes import this_process
from spine.journal.reader import JournalReader
from spine.kernel.errors import JournalError

def child(*attempts):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)
    async def main():
        for attempt in attempts:
            try:
                print((await attempt()).run_id, flush=True)
            except JournalError as error:
                print(type(error).__name__, "fork" in str(error), flush=True)
        await parents.close()
    asyncio.run(main())
    os._exit(0)

async def own():
    reader = JournalReader(sys.argv[1])
    try:
        return await reader.run("run-1")
    finally:
        await reader.close()

loop, parents = asyncio.new_event_loop(), JournalReader(sys.argv[1])
print(loop.run_until_complete(parents.run("run-1")).run_id, flush=True)
child(lambda: parents.run("run-1"), own)
print(loop.run_until_complete(parents.run("run-1")).run_id, flush=True)
loop.run_until_complete(parents.close())
child(own)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
async def test_a_fork_is_refused_its_parents_threads_and_may_open_its_own_where_that_is_safe(journal_url: str) -> None:
    await write(journal_url, day())
    command = [sys.executable, "-c", FORK, journal_url]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=25, check=True)
    own = "run-1" if journal_url.startswith("postgresql") else "JournalUnavailable True"
    assert done.stdout.splitlines() == ["run-1", "JournalError True", own, "run-1", "run-1"]


async def test_a_worker_tells_pieces_that_wait_at_the_same_time_together() -> None:
    loop, told = asyncio.get_running_loop(), 0
    worker, go = Worker("tester", together=8), threading.Event()
    worker.start()
    first = asyncio.create_task(worker.call(go.wait))
    await asyncio.sleep(0)
    rest = [asyncio.create_task(worker.call(lambda n=n: n)) for n in range(7)]
    await asyncio.sleep(0)
    wake = loop.call_soon_threadsafe

    def counted(*given: object) -> asyncio.Handle:
        nonlocal told
        told += 1
        return wake(*given)  # type: ignore[arg-type]

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
    go.set()
    assert await asyncio.gather(first, *rest) == [True, *range(7)]
    assert told == 1
    await worker.stop(lambda: None)
