"""The disk is full: nothing runs without its record, what ran is recorded later, and with room everything goes on."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path

import anyio
import pytest

from tests.governed import SQLITE, clock, intact, journal, path_of, query, running, until
from tests.integration.mill import Mill

pytestmark = pytest.mark.anyio


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Use every block that is left."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    filler.write(b"\0" * size)
            except OSError:
                continue


def free(disk: Path) -> None:
    (disk / "filler").unlink()


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No room for another row: somebody's old snapshot keeps the log from being used again from its beginning."""
    with closing(sqlite3.connect(disk / "spine.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM journal").fetchone()
        fill(disk)
        try:
            yield
        finally:
            free(disk)


async def test_a_full_disk_refuses_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    """JOURNAL_UNAVAILABLE and no handler runs; with space everything works, in one unbroken chain."""
    mill = Mill(f"{SQLITE}{small_disk}/spine.db")
    async with running(mill.spine):
        assert (await mill.execute()).success
        for _ in range(2):
            with full(small_disk):
                # The last block of the log may have room for one more.
                while (await mill.execute()).error_code != "JOURNAL_UNAVAILABLE":
                    pass
                await mill.refused_everything()
            assert (await mill.execute()).success
        await mill.works_again()
    intact(mill.url)
    assert journal(mill.url, "outcome") != []


async def test_what_ran_while_the_disk_filled_is_told_and_recorded_later(small_disk: Path) -> None:
    """OUTCOME_UNRECORDED: it ran, with its data; the outcome is recorded, once, when the journal takes writes again."""
    virtual = clock()
    mill = Mill(f"{SQLITE}{small_disk}/spine.db", clock=virtual)
    async with running(mill.spine), AsyncExitStack() as until_freed:
        mill.during = lambda: until_freed.enter_context(full(small_disk))
        call = {"idempotency_key": "k", "run_id": "run-1"}
        result = await mill.execute("mill.turn", **call)
        assert (result.success, result.error_code, result.durable) == (False, "OUTCOME_UNRECORDED", False)
        assert result.data == {"turned": mill.ran}
        assert "ran and succeeded" in str(result.error)
        assert result.decision is not None
        assert result.decision.allowed
        assert mill.spine.health().journal["unrecorded"] == 1
        why = await mill.spine.why("run-1")
        assert why.cause.code == "OPERATION_OPEN"

        ran = mill.ran
        await until_freed.aclose()
        repeat = asyncio.create_task(mill.execute("mill.turn", **call))
        # Housekeeping records it in one of its next rounds; meanwhile the repeat of the key waits for it.
        await until(lambda: mill.spine.health().journal["unrecorded"] == 0, clock=virtual)
        await until(repeat.done, clock=virtual)
        told = await repeat
        assert (told.success, told.data) == (True, {"turned": ran})
        assert mill.ran == ran
        assert mill.spine.health().ok
    decision_id = result.metadata["decision_id"]
    outcomes = [body for body in journal(mill.url, "outcome") if body["decision_id"] == decision_id]
    assert [body["success"] for body in outcomes] == [True]
    intact(mill.url)


async def test_buffered_operations_run_on_a_full_disk_and_count_what_is_lost(small_disk: Path) -> None:
    """They did not promise a record: the results say durable=False, health counts what never became durable."""
    mill = Mill(f"{SQLITE}{small_disk}/spine.db")
    async with running(mill.spine):
        assert (await mill.execute("mill.buffered")).success
        await mill.spine.flush()
        with full(small_disk):
            while (await mill.execute()).error_code != "JOURNAL_UNAVAILABLE":
                pass
            for _ in range(10):
                result = await mill.execute("mill.buffered")
                assert (result.success, result.durable) == (True, False)
            with anyio.fail_after(10):
                await mill.spine.flush()
            assert mill.spine.health().journal["buffered_lost"] == 20
        await mill.works_again()
    intact(mill.url)


FILE_LIMIT = """
import asyncio, json, os, resource, sys
from spine import Spine

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main(url, path):
    spine, ran = Spine(url), 0

    @spine.operation("mill.grind")
    async def grind(ctx):
        nonlocal ran
        ran += 1
        if ctx.params.get("fill"):
            limit(4096)
        return {"ran": ran}

    async def execute(**params):
        result = await spine.execute("mill.grind", tenant_id="acme", params=params)
        return [result.error_code, ran, spine.health().ok]

    told = []
    async with spine:
        told.append(await execute())
        told.append(await execute(fill=True))
        told.append(await execute())
        limit(resource.RLIM_INFINITY)
        told.append(await execute())
        while spine.health().journal["unrecorded"]:
            await asyncio.sleep(0.01)
    print(json.dumps(told))

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_limit_on_file_sizes_is_withstood_like_a_full_disk(sqlite_url: str) -> None:
    """Where no small disk can be mounted: the writes fail in the middle of an operation, and recover."""
    command = [sys.executable, "-c", FILE_LIMIT, sqlite_url, str(path_of(sqlite_url))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [None, 1, True],
        ["OUTCOME_UNRECORDED", 2, False],
        ["JOURNAL_UNAVAILABLE", 2, False],
        [None, 3, True],
    ]
    assert [body["success"] for body in journal(sqlite_url, "outcome")] == [True] * 3
    assert query(sqlite_url, "SELECT count(*) FROM open_decisions") == [(0,)]
    intact(sqlite_url)
