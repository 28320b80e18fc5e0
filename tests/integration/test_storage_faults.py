"""The database fails: read-only, full, locked, gone, too new, or left behind by kill -9. The Spine survives it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from actors import recorder
from spine import OperationContext, OperationResult, Settings, Spine, TransactionFailed
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import JournalUnavailable, SchemaMismatch
from tests.governed import SQLITE, Published, authority_fields, connect, intact, journal, path_of, query, running, until

pytestmark = pytest.mark.anyio


def clock(ahead_s: float = 0) -> VirtualClock:
    return VirtualClock(time.time_ns() // 1000 + round(ahead_s * 1e6))


class Mill:
    """A Spine that counts what its handlers did; ``during`` is done inside the handler of ``mill.turn``."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.url = url
        self.spine = Spine(url, publisher=Published(), settings=Settings(**settings))
        self.ran = 0
        self.during: Any = None

        @self.spine.operation("mill.grind")
        @self.spine.operation("mill.buffered", durability="buffered")
        async def grind(ctx: OperationContext) -> dict[str, Any]:
            self.ran += 1
            return {}

        @self.spine.operation("mill.turn")
        async def turn(ctx: OperationContext) -> dict[str, Any]:
            self.ran += 1
            self.during()
            return {"turned": self.ran}

    async def execute(self, operation: str = "mill.grind", **call: Any) -> OperationResult:
        result = await self.spine.execute(operation, **{"tenant_id": "acme", **call})
        assert result.decision is not None
        assert authority_fields(result.metadata) == []
        return result

    async def refused_everything(self) -> None:
        """Nothing that needs a record happens, and each caller is told so in its own way."""
        ran, spine = self.ran, self.spine
        result = await self.execute(run_id="run-1")
        assert (result.success, result.error_code, result.durable) == (False, "JOURNAL_UNAVAILABLE", False)
        assert "free" in str(result.error)
        keyed = await self.execute(idempotency_key="k")
        assert keyed.error_code == "JOURNAL_UNAVAILABLE"
        assert self.ran == ran, "a handler ran without its decision"
        started = await spine.start_run("run-2", tenant_id="acme")
        assert (started.allowed, started.code) == (False, "JOURNAL_UNAVAILABLE")
        with pytest.raises(TransactionFailed) as failure:
            await spine.complete_run("run-3", tenant_id="acme", run_status="succeeded")
        assert (failure.value.code, failure.value.phase) == ("JOURNAL_UNAVAILABLE", "FAILED")
        with pytest.raises(JournalUnavailable, match="does not act"):
            await spine.halt(reason="an exercise", actor="ann")
        health = spine.health()
        assert health.governance["state"] == "active"
        assert not health.ok
        assert not health.journal["available"]
        assert health.journal["error"]
        assert health.restarts == 0

    async def works_again(self) -> None:
        """As if nothing had been: the refused run starts, the refused key runs, the completion commits."""
        spine = self.spine
        assert (await self.execute(run_id="run-1", idempotency_key="k")).success
        assert (await spine.start_run("run-2", tenant_id="acme")).allowed
        assert (await spine.complete_run("run-3", tenant_id="acme", run_status="succeeded")).is_complete
        await spine.halt(reason="an exercise", actor="ann")
        await spine.restore(reason="over", actor="ann")
        health = spine.health()
        assert health.ok
        assert health.journal["available"]
        assert health.journal["error"] is None


# -- a full disk


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


# -- not this Spine's database


async def test_a_database_of_a_newer_schema_is_left_alone(database_url: str) -> None:
    """SchemaMismatch tells both versions and the remedy; nothing in it is changed."""
    async with running(Mill(database_url).spine):
        pass
    query(database_url, "UPDATE spine_meta SET value = '999' WHERE key = 'schema_version'")
    with pytest.raises(SchemaMismatch, match=r"999.*upgrade hoc-spine"):
        await Mill(database_url).spine.start()
    assert query(database_url, "SELECT value FROM spine_meta") == [("999",)]
    assert journal(database_url) == []


async def test_a_database_with_other_tables_of_the_same_name_is_left_alone(database_url: str) -> None:
    """Somebody's own `runs` is not a journal's."""
    query(database_url, "CREATE TABLE runs (mine TEXT)")
    with pytest.raises(SchemaMismatch, match="runs"):
        await Mill(database_url).spine.start()


@pytest.mark.parametrize("content", [b"this is no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_file_that_is_no_database_is_left_alone(sqlite_url: str, content: bytes) -> None:
    """JournalUnavailable, and the file keeps its bytes."""
    path_of(sqlite_url).write_bytes(content)
    with pytest.raises(JournalUnavailable, match=r"spine\.db"):
        await Mill(sqlite_url).spine.start()
    assert path_of(sqlite_url).read_bytes() == content


async def test_a_directory_in_the_databases_place_is_refused(sqlite_url: str) -> None:
    """JournalUnavailable names it."""
    path_of(sqlite_url).mkdir()
    with pytest.raises(JournalUnavailable, match=r"spine\.db"):
        await Mill(sqlite_url).spine.start()


# -- kill -9

VICTIM = """
import asyncio, itertools, sys
from spine import Spine

async def main(url):
    spine = Spine(url)

    @spine.operation("mill.grind")
    async def grind(ctx):
        return {}

    @spine.operation("mill.hang")
    @spine.operation("mill.again", idempotent=True)
    async def hang(ctx):
        print("hangs", flush=True)
        await asyncio.Event().wait()

    async def load(n):
        for number in itertools.count():
            result = await spine.execute("mill.grind", tenant_id="acme", run_id=f"run-{n}")
            print("told", result.metadata["decision_id"], flush=True)
            if number % 10 == 9:
                key = f"{number}"
                done = await spine.complete_run(f"run-{n}", tenant_id="acme", run_status="ok", completion_key=key)
                print("completed", done.transaction_id, flush=True)

    async with spine:
        keyed = {"tenant_id": "acme", "run_id": "hung", "idempotency_key": "k"}
        hung = [spine.execute(name, **keyed) for name in ("mill.hang", "mill.again")]
        await asyncio.gather(*hung, *map(load, range(5)))

asyncio.run(main(sys.argv[1]))
"""


def kill_under_load(url: str) -> list[list[str]]:
    """What a process told before it was killed in the middle of its work."""
    with subprocess.Popen([sys.executable, "-c", VICTIM, url], stdout=subprocess.PIPE, text=True) as victim:
        try:
            assert victim.stdout is not None
            lines = []
            while sum(line.startswith("completed") for line in lines) < 10 or lines.count("hangs\n") < 2:
                lines.append(victim.stdout.readline())
                assert lines[-1], "it ended by itself"
        finally:
            victim.kill()
        lines += victim.stdout.readlines()
    return [line.split() for line in lines if line.endswith("\n") and not line.startswith("20")]


async def test_after_kill_minus_nine_everything_told_is_there_and_the_next_process_goes_on(database_url: str) -> None:
    """Told outcomes and completions are in the journal, what was open is INTERRUPTED once the lease is over."""
    told = kill_under_load(database_url)
    outcomes = {body["decision_id"] for body in journal(database_url, "outcome")}
    committed = {body["tx_id"] for body in journal(database_url, "tx.committed")}
    assert {line[1] for line in told if line[0] == "told"} <= outcomes
    assert {line[1] for line in told if line[0] == "completed"} <= committed
    intact(database_url)
    left = {decision_id for (decision_id,) in query(database_url, "SELECT decision_id FROM open_decisions")}
    assert len(left) >= 2

    heir = Mill(database_url, clock=(later := clock(ahead_s=60)))
    attempts: list[int] = []

    @heir.spine.operation("mill.hang")
    @heir.spine.operation("mill.again", idempotent=True)
    async def again(ctx: OperationContext) -> dict[str, Any]:
        attempts.append(ctx.attempt)
        return {}

    async with running(heir.spine):
        await until(lambda: query(database_url, "SELECT count(*) FROM open_decisions") == [(0,)], clock=later)
        in_doubt = await heir.execute("mill.hang", idempotency_key="k", run_id="hung")
        assert in_doubt.error_code == "IN_DOUBT"
        retried = await heir.execute("mill.again", idempotency_key="k", run_id="hung")
        assert retried.success
        assert attempts == [2]
        assert heir.spine.health().decisions["interrupted"] == len(left)
        pending = "SELECT count(*) FROM outbox WHERE state = 'pending'"
        await until(lambda: query(database_url, pending) == [(0,)], clock=later)
        await heir.works_again()
    closed = [body for body in journal(database_url, "outcome") if body["decision_id"] in left]
    assert len(closed) == len(left)
    assert {body["error_code"] for body in closed} == {"INTERRUPTED"}
    intact(database_url)


async def test_what_a_living_process_runs_is_not_interrupted_by_another_start(database_url: str) -> None:
    """Only a lease that has run out makes a process dead: starting beside it touches nothing of its work."""
    mill = Mill(database_url)
    entered, leave = asyncio.Event(), asyncio.Event()

    @mill.spine.operation("mill.hang")
    async def hang(ctx: OperationContext) -> dict[str, Any]:
        entered.set()
        await leave.wait()
        return {}

    async with running(mill.spine):
        call = asyncio.create_task(mill.execute("mill.hang"))
        await entered.wait()
        beside = Mill(database_url)
        async with running(beside.spine):
            assert (await beside.execute()).success
            assert beside.spine.health().decisions["interrupted"] == 0
        leave.set()
        assert (await call).success
    assert all(body["success"] for body in journal(database_url, "outcome"))


# -- a commit whose end comes too late for who waits for it


class LateCommits:
    """While entered, commits wait for the end of the block, and who waits for them waits a fifth of a second."""

    def __init__(self, spine: Spine, patch: pytest.MonkeyPatch) -> None:
        self.writer, self.patch = spine._system.writer, patch

    def __enter__(self) -> None:
        self.over = asyncio.Event()
        self.commit = self.writer.commit

        async def late(units: Any) -> Any:
            await self.over.wait()
            return await self.commit(units)

        self.patch.setattr(self.writer, "commit", late)
        self.patch.setattr(recorder, "COMMIT_S", 0.2)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        self.over.set()


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_decision_that_is_committed_too_late_is_told_as_not_known_and_closed(
    database_url: str, monkeypatch: pytest.MonkeyPatch, keyed: bool
) -> None:
    """The handler does not run, nobody claims to know whether it is recorded, and nothing stays open in the journal."""
    mill = Mill(database_url)
    key = "k" if keyed else None
    async with running(mill.spine):
        await mill.spine.start_run("run-1", tenant_id="acme")
        with LateCommits(mill.spine, monkeypatch):
            result = await mill.execute(run_id="run-1", idempotency_key=key)
        assert (result.error_code, result.durable, mill.ran) == ("JOURNAL_UNAVAILABLE", False, 0)
        assert "did not run: it is not known whether its decision was recorded" in str(result.error)
        await until(lambda: journal(database_url, "outcome"))
        (decision,), (outcome,) = journal(database_url, "decision"), journal(database_url, "outcome")
        assert (decision["allowed"], decision["decision_id"]) == (True, outcome["decision_id"])
        assert (outcome["success"], outcome["error_code"]) == (False, "INTERRUPTED")
        assert "did not run" in outcome["error"]
        await until(lambda: mill.spine.health().journal["unrecorded"] == 0)
    assert query(database_url, "SELECT count(*) FROM open_decisions") == [(0,)]
    intact(database_url)


async def test_what_was_not_yet_recorded_is_recorded_at_the_stop(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Spine stops before it has looked again: a decision it knows of is not left open for others to guess about."""
    mill = Mill(sqlite_url, clock=clock())
    async with running(mill.spine):
        with LateCommits(mill.spine, monkeypatch):
            call = asyncio.create_task(mill.execute(run_id="run-1"))
            await until(call.done, clock=mill.spine._system.clock)
        assert "not known" in str((await call).error)
        await until(lambda: journal(sqlite_url, "decision"))
        assert mill.spine.health().journal["unrecorded"] == 1
    (decision,), (outcome,) = journal(sqlite_url, "decision"), journal(sqlite_url, "outcome")
    assert outcome["decision_id"] == decision["decision_id"]
    assert "did not run" in outcome["error"]


async def test_a_decision_that_was_never_committed_leaves_no_outcome(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave up its place in the queue: what was kept for it is forgotten, the rest goes on."""
    mill = Mill(sqlite_url)
    async with running(mill.spine):
        with LateCommits(mill.spine, monkeypatch):
            results = [await mill.execute(run_id=f"run-{n}") for n in range(2)]
        assert all("not known" in str(result.error) for result in results)
        assert mill.spine.health().journal["unrecorded"] == 2
        await until(lambda: mill.spine.health().journal["unrecorded"] == 0)
        assert (await mill.execute(run_id="run-1")).success
    assert [row["run_id"] for row in journal(sqlite_url, "decision")] == ["run-0", "run-1"]
    assert [row["run_id"] for row in journal(sqlite_url, "outcome")] == ["run-0", "run-1"]
    intact(sqlite_url)


async def test_an_outcome_a_start_a_completion_and_a_switch_committed_too_late_are_told_as_not_known(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is said not to have happened; each says what to do, and doing it tells what stands."""
    mill = Mill(sqlite_url)
    async with running(mill.spine):
        spine = mill.spine
        with ExitStack() as stack:
            mill.during = lambda: stack.enter_context(LateCommits(spine, monkeypatch))
            result = await mill.execute("mill.turn")
        assert result.error_code == "OUTCOME_UNRECORDED"
        assert "not known whether its outcome was recorded" in str(result.error)
        with LateCommits(spine, monkeypatch):
            started = await spine.start_run("run-1", tenant_id="acme")
            assert "not known whether the start of run 'run-1' was recorded" in started.reason
        assert (await spine.start_run("run-1", tenant_id="acme")).allowed
        with LateCommits(spine, monkeypatch), pytest.raises(TransactionFailed, match="not known whether run 'run-1'"):
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        assert (await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")).is_complete
        not_known = pytest.raises(JournalUnavailable, match="not known whether the switch to 'halted' was recorded")
        with LateCommits(spine, monkeypatch), not_known:
            await spine.halt(reason="an exercise", actor="ann")
        await until(lambda: spine.health().governance["state"] == "halted")
    assert len(journal(sqlite_url, "outcome")) == len(journal(sqlite_url, "governance.changed")) == 1
    assert len(journal(sqlite_url, "tx.committed")) == 1
    intact(sqlite_url)
