"""The database is read-only, locked, gone or disconnected: the Spine refuses, or waits, and goes on when it is back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio
import pytest

from tests.governed import SQLITE, connect, intact, journal, path_of, query, running, until
from tests.integration.mill import Mill

pytestmark = pytest.mark.anyio


# -- read-only

# Root without its capabilities is bound by file modes like everybody.
AS_ANYBODY = """
import ctypes, os
if os.geteuid() == 0:
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
"""
READ_ONLY_DIRECTORY = """
import asyncio, sys
from spine import Spine
from spine.kernel.errors import JournalUnavailable

async def main(url):
    try:
        async with Spine(url):
            print("started")
    except JournalUnavailable as error:
        print(error)

asyncio.run(main(sys.argv[1]))
"""
READ_ONLY_FILE = """
import asyncio, os, sys
from spine import Spine

async def main(url, path):
    spine, ran = Spine(url), 0

    @spine.operation("mill.grind")
    async def grind(ctx):
        nonlocal ran
        ran += 1
        return {}

    os.chmod(path, 0o444)
    async with spine:
        print((await spine.execute("mill.grind", tenant_id="acme")).error_code, ran, spine.health().ok)
        print((await spine.start_run("run-1", tenant_id="acme")).code)
        # SQLite made its log with the same mode.
        for file in (path, path + "-wal", path + "-shm"):
            os.chmod(file, 0o644)
        print((await spine.execute("mill.grind", tenant_id="acme")).error_code, ran, spine.health().ok)

asyncio.run(main(*sys.argv[1:]))
"""


def as_anybody(program: str, *args: str) -> str:
    command = [sys.executable, "-c", AS_ANYBODY + program, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if "[error" not in line)


@pytest.mark.skipif(not sys.platform.startswith("linux") and os.geteuid() == 0, reason="root may write everywhere here")
def test_a_read_only_directory_refuses_the_start(tmp_path: Path) -> None:
    """No database can be made there: JournalUnavailable names the file."""
    directory = tmp_path / "read-only"
    directory.mkdir(mode=0o555)
    told = as_anybody(READ_ONLY_DIRECTORY, f"{SQLITE}{directory}/spine.db")
    assert str(directory / "spine.db") in told
    assert "started" not in told
    assert list(directory.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux") and os.geteuid() == 0, reason="root may write everywhere here")
async def test_a_read_only_file_refuses_until_it_may_be_written(sqlite_url: str) -> None:
    """JOURNAL_UNAVAILABLE, nothing runs; writable again, the same Spine goes on."""
    async with running(Mill(sqlite_url).spine):
        pass
    assert as_anybody(READ_ONLY_FILE, sqlite_url, str(path_of(sqlite_url))).splitlines() == [
        "JOURNAL_UNAVAILABLE 0 False",
        "JOURNAL_UNAVAILABLE",
        "None 1 True",
    ]
    intact(sqlite_url)


# -- locked


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Another program holds the write lock."""
    with closing(connect(url)) as connection:
        if url.startswith(SQLITE):
            connection.execute("BEGIN IMMEDIATE")
        else:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM journal_head FOR UPDATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


async def test_a_locked_database_refuses_after_the_busy_timeout(database_url: str) -> None:
    """Bounded by five seconds, then JOURNAL_UNAVAILABLE and no handler ran; unlocked, it works at once."""
    mill = Mill(database_url)
    async with running(mill.spine):
        assert (await mill.execute()).success
        with locked(database_url), anyio.fail_after(12):
            began = time.monotonic()
            result = await mill.execute()
            assert 4 < time.monotonic() - began < 10
        assert result.error_code == "JOURNAL_UNAVAILABLE"
        assert mill.ran == 1
        with anyio.fail_after(5):
            await mill.works_again()
    intact(database_url)


async def test_a_lock_that_is_let_go_in_time_is_only_waited_for(database_url: str) -> None:
    """Another writer's short transaction costs nobody anything but time."""
    mill = Mill(database_url)
    async with running(mill.spine), anyio.create_task_group() as group:
        with locked(database_url):
            for _ in range(5):
                group.start_soon(mill.execute)
            await until(lambda: mill.spine.health().mailboxes["router"] == 0)
            await anyio.sleep(0.2)
            assert mill.ran == 0
    assert mill.ran == 5
    assert len(journal(database_url, "outcome")) == 5


# -- gone, replaced, disconnected


async def test_a_database_file_that_is_gone_or_replaced_is_not_written_to(sqlite_url: str, tmp_path: Path) -> None:
    """Nothing is acknowledged into a file without a name, or into another journal; put back, it goes on."""
    mill = Mill(sqlite_url)
    path, away = path_of(sqlite_url), tmp_path / "away"
    async with running(mill.spine):
        assert (await mill.execute()).success
        # Nobody is to look at the file in the midst of the moving: files cannot be moved at once.
        await until(lambda: not mill.spine._system.reader._scans._reading)
        away.mkdir()
        # The database first, and last on the way back: whoever looks at it meanwhile must not begin another log.
        for file in sorted(path.parent.glob("spine.db*")):
            shutil.move(file, away / file.name)
        gone = await mill.execute()
        assert gone.error_code == "JOURNAL_UNAVAILABLE"
        path.write_bytes(b"")
        replaced = await mill.execute()
        assert replaced.error_code == "JOURNAL_UNAVAILABLE"
        assert path.read_bytes() == b""
        assert mill.ran == 1
        path.unlink()
        for file in sorted(away.iterdir(), reverse=True):
            shutil.move(file, path.parent / file.name)
        # Whoever looked at the file in the midst of the moving is told so; soon nobody is.
        with anyio.fail_after(10):
            while not (await mill.execute(run_id="run-0")).success:
                await anyio.sleep(0.01)
        await mill.works_again()
    intact(sqlite_url)


@pytest.mark.postgresql
async def test_a_lost_connection_is_made_again(postgresql_url: str) -> None:
    """The server drops every connection: a call may be refused, the next ones work, and nothing is doubled."""
    mill = Mill(postgresql_url)
    async with running(mill.spine):
        for number in range(3):
            assert (await mill.execute()).success
            query(
                postgresql_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            with anyio.fail_after(10):
                # What writes and what reads have each lost theirs.
                while (await mill.execute(idempotency_key=f"key {number}")).error_code == "JOURNAL_UNAVAILABLE":
                    pass
        await mill.works_again()
    decisions = [body["decision_id"] for body in journal(postgresql_url, "decision")]
    assert len(decisions) == len(set(decisions))
    intact(postgresql_url)
