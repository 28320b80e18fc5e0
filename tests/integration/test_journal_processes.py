"""Several processes on one journal, and processes that are killed, starved or not allowed to write."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spine.governance.units import Committed, Unit
from spine.journal.reader import JournalReader
from spine.journal.verify import verify
from spine.journal.writer import JournalWriter
from tests.unit.journal_kit import all_committed, started, write

pytestmark = pytest.mark.timeout(60)


def process(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.integration.journal_process", *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """What is in the list is not left behind."""
    started_ones: list[subprocess.Popen[str]] = []
    yield started_ones
    for one in started_ones:
        one.kill()
        one.communicate()


def go(*ready: subprocess.Popen[str]) -> None:
    """Let them begin together."""
    for one in ready:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in ready:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()


def end(one: subprocess.Popen[str]) -> list[str]:
    said, complained = one.communicate(timeout=50)
    assert (one.returncode, complained) == (0, "")
    return said.splitlines()


def test_two_processes_under_load_keep_one_chain(database_url: str, processes: list[subprocess.Popen[str]]) -> None:
    asyncio.run(write(database_url, []))
    processes += [process("load", database_url, name, "40") for name in ("a", "b")]
    go(*processes)
    said = [line.split() for one in processes for line in end(one)]
    assert len(said) == 2 * 40 * 10
    places = [int(first) for _, first, _ in said]
    assert sorted(places) == list(range(1, 801))
    report = verify(database_url)
    assert (report.ok, report.rows, report.breaks) == (True, 800, [])


@pytest.mark.parametrize("after", [3, 40])
def test_what_a_killed_process_acknowledged_is_there(
    database_url: str, processes: list[subprocess.Popen[str]], after: int
) -> None:
    asyncio.run(write(database_url, []))
    processes += [process("load", database_url, name, "0") for name in ("a", "b")]
    go(*processes)
    said: list[str] = []
    for _ in range(after):
        for one in processes:
            assert one.stdout is not None
            said.append(one.stdout.readline())
    for one in processes:
        one.kill()
        assert one.stdout is not None
        # The last line may have been cut by the kill: it was not said then.
        said += [line for line in one.stdout.readlines() if line.endswith("\n")]
    told = {unit: Committed(int(first), int(last)) for unit, first, last in (line.split() for line in said)}

    async def found() -> dict[str, Committed]:
        writer = JournalWriter(database_url)
        await writer.open()
        try:
            # A dead process leaves no lock behind: the next one writes at once.
            assert all_committed(await writer.commit([Unit("after", [started("after")])]))
            return await writer.find_units(told, 0)
        finally:
            await writer.close()

    assert asyncio.run(found()) == told
    assert verify(database_url).ok


def test_a_switch_binds_every_process_from_its_commit(
    database_url: str, processes: list[subprocess.Popen[str]]
) -> None:
    asyncio.run(write(database_url, []))
    processes += [process("switch", database_url, "10") for _ in range(2)]
    processes += [process("decide", database_url, name, "50") for name in ("a", "b")]
    go(*processes)
    for one in processes:
        end(one)

    async def bodies() -> list[dict[str, Any]]:
        reader = JournalReader(database_url)
        rows = await reader.tail(0, 10_000)
        await reader.close()
        return [row.body for row in rows]

    epoch, decisions = 1, 0
    for body in asyncio.run(bodies()):
        if body["kind"] == "governance.changed":
            assert body["epoch"] == epoch + 1
            epoch = body["epoch"]
        else:
            assert body["epoch"] == epoch
            decisions += 1
    assert (epoch, decisions) == (21, 100)
    assert verify(database_url).ok


def test_a_full_disk_refuses_and_what_was_acknowledged_stays(sqlite_url: str) -> None:
    assert end(process("full_disk", sqlite_url)) == [
        "refused 4",
        "after Committed",
        "kept True",
        "whole True",
    ]


def test_evidence_that_may_only_be_read_is_read_and_not_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = f"sqlite:///{folder}/spine.db"
        asyncio.run(write(url, [Unit("u", [started()])]))
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        try:
            refusal, *rest = end(process("read_only", url))
        finally:
            folder.chmod(0o755)
        assert refusal.startswith("JournalUnavailable")
        assert rest == ["rows 1", "whole True"]
        assert sorted(path.name for path in folder.iterdir()) == ["spine.db", "spine.db-spine.lock"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_is_refused_by_name_and_may_open_its_own_where_that_is_safe(database_url: str) -> None:
    """SQLite would lose what a child commits beside the connections it inherited; PostgreSQL does not."""
    safe = database_url.startswith("postgresql")
    assert end(process("fork", database_url)) == [
        "refused True",
        "refused True",
        "refused True",
        "own Committed(first=2, last=2)" if safe else "own refused True",
        "child 0",
        f"parent Committed(first={2 + safe}, last={2 + safe})",
        f"whole True {2 + safe}",
    ]
