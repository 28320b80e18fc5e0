"""Law 2: wherever a process is killed, what it told is in the journal; buffered operations lose a bounded tail only."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from spine import OperationContext, Spine
from spine.settings import Settings
from tests.governed import clock
from tests.laws.world import assert_intact, file_of, found, rows, unanswered, until

pytestmark = pytest.mark.anyio

LOAD = Path(__file__).with_name("load.py")
BUFFERED_ROWS = 1000


@dataclass
class Told:
    """What a killed process had said before its end, and when that was."""

    lines: list[dict[str, Any]]
    killed_at: float = 0.0
    kinds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.lines:
            self.kinds.setdefault(line["what"], []).append(line)

    def of(self, what: str) -> list[dict[str, Any]]:
        return self.kinds.get(what, [])


def load(url: str, first: int, callers: int, kind: str, effects: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, str(LOAD), url, str(first), str(callers), kind, str(effects)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_under_load(process: subprocess.Popen[bytes], after_lines: int, then_s: float) -> Told:
    """kill -9 once the process has said so much, and a moment later; gives all it had said by then."""
    assert process.stdout is not None
    assert process.stderr is not None
    complaints: list[bytes] = []
    # Its log must not fill the pipe and hold it up.
    reader = threading.Thread(target=lambda: complaints.append(process.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    lines = []
    for line in process.stdout:
        lines.append(json.loads(line))
        if len(lines) > after_lines:
            break
    assert lines, complaints
    # Where in its work the process is hit is left to chance.
    killer = threading.Timer(then_s, process.kill)
    killer.start()
    lines += [json.loads(line) for line in process.stdout if line.endswith(b"\n")]
    killer.join()
    killed_at = time.monotonic()
    assert process.wait(20) == -signal.SIGKILL, complaints
    reader.join()
    process.stdout.close()
    process.stderr.close()
    return Told(lines, killed_at)


def assert_recorded(told: Told, journal: list[dict[str, Any]]) -> None:
    """Everything a caller heard is in the journal as it heard it."""
    decisions = {row["decision_id"]: row for row in journal if row["kind"] == "decision"}
    outcomes = {row["decision_id"]: row for row in journal if row["kind"] == "outcome"}
    for line in told.of("operation"):
        assert line["durable"], line
        decision = decisions[line["decision"]]
        assert decision["allowed"] is line["allowed"]
        if line["allowed"]:
            outcome = outcomes[line["decision"]]
            assert (outcome["success"], outcome["error_code"]) == (line["success"], line["code"])
            assert outcome["seq"] > decision["seq"]
        else:
            assert decision["final"]
            assert decision["code"] == line["code"]
    started = {row["run_id"] for row in journal if row["kind"] == "run.started"}
    assert {line["run"] for line in told.of("start")} <= started
    committed = {row["tx_id"] for row in journal if row["kind"] == "tx.committed"}
    assert {line["tx"] for line in told.of("completion")} <= committed
    published = {row["tx_id"] for row in journal if row["kind"] == "event.published"}
    assert {line["tx"] for line in told.of("completion") if line["phase"] == "EVENTS_PUBLISHED"} <= published


async def recover(url: str) -> None:
    """A later process finds what the dead ones left open; its clock is past their leases."""
    async with Spine(url, settings=Settings(clock=clock(ahead_s=60))):
        await until(lambda: not unanswered(rows(url)))


async def test_a_process_killed_at_random_moments_under_load_loses_nothing_that_it_told(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Four processes on one database, one after the other, each killed in the midst of its work.

    Told results, denials, starts and completions are recorded as told; every effect has its committed decision; after
    each kill the record is intact; at the end the next process closes every open decision once, as INTERRUPTED.
    """
    chance = random.Random(20260)
    effects = tmp_path / "effects"
    operations = 0
    for life in range(4):
        process = load(sqlite_url, 1_000_000 * (life + 1), 12, "mixed", effects)
        told = await asyncio.to_thread(kill_under_load, process, chance.randint(20, 500), chance.uniform(0, 0.02))
        operations += len(told.of("operation"))
        assert_intact(sqlite_url)
        journal = rows(sqlite_url)
        assert_recorded(told, journal)
        decided = {row["params"]["n"] for row in journal if row["kind"] == "decision" and row["allowed"]}
        happened = [int(line) for line in effects.read_text().split()]
        assert set(happened) <= decided
        assert len(happened) == len(set(happened))
    assert operations > 100

    left = unanswered(rows(sqlite_url))
    before = {row["decision_id"] for row in found(sqlite_url, "outcome")}
    await recover(sqlite_url)
    journal = rows(sqlite_url)
    answers = [row["decision_id"] for row in journal if row["kind"] == "outcome"]
    assert len(answers) == len(set(answers))
    late = [row for row in journal if row["kind"] == "outcome" and row["decision_id"] not in before]
    assert {row["decision_id"] for row in late} == left
    assert all((row["success"], row["error_code"]) == (False, "INTERRUPTED") for row in late)
    # Every outcome follows its decision, every run's rows its start, every step its transaction.
    decided_at = {row["decision_id"]: row["seq"] for row in journal if row["kind"] == "decision"}
    assert all(decided_at[row["decision_id"]] < row["seq"] for row in journal if row["kind"] == "outcome")
    begun = {row["tx_id"] for row in journal if row["kind"] == "tx.begun"}
    assert begun == {row["tx_id"] for row in journal if row["kind"] == "tx.committed"}
    assert_intact(sqlite_url)


@pytest.mark.parametrize("life", range(2))
async def test_buffered_operations_lose_at_most_their_bounded_tail_and_say_so(
    sqlite_url: str, tmp_path: Path, life: int
) -> None:
    """They tell ``durable=False``; killed, the process has lost nothing but the last of them."""
    effects = tmp_path / "effects"
    process = load(sqlite_url, 1, 16, "buffered", effects)
    told = await asyncio.to_thread(kill_under_load, process, 700 + 900 * life, 0.003 * life)
    assert_intact(sqlite_url)
    allowed = [line for line in told.of("operation") if line["allowed"]]
    denied = [line for line in told.of("operation") if not line["allowed"]]
    assert len(allowed) > 500
    assert not [line for line in allowed if line["durable"]]
    journal = rows(sqlite_url)
    decisions = {row["decision_id"] for row in journal if row["kind"] == "decision"}
    outcomes = {row["decision_id"] for row in journal if row["kind"] == "outcome"}
    assert outcomes <= decisions
    # A denial is never buffered.
    assert denied
    assert all(line["durable"] and line["decision"] in decisions for line in denied)
    lost = sum(line["decision"] not in decisions for line in allowed)
    lost += sum(line["decision"] not in outcomes for line in allowed)
    assert lost <= BUFFERED_ROWS
    # What is missing is the end of what was told, without holes.
    kept = [line["decision"] in outcomes for line in allowed]
    assert kept == sorted(kept, reverse=True)
    assert any(kept)


async def test_when_the_journal_is_slow_buffered_operations_wait_before_they_could_lose_more(sqlite_url: str) -> None:
    """Another process holds the lock: what is told and not yet durable stays within the bound, the rest waits."""
    spine = Spine(sqlite_url)

    @spine.operation("work.buffered", durability="buffered", concurrency=1000)
    async def handler(ctx: OperationContext) -> None:
        pass

    async with spine:
        with closing(sqlite3.connect(file_of(sqlite_url), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            calls = [asyncio.ensure_future(spine.execute("work.buffered", tenant_id="acme")) for _ in range(900)]
            # Whoever finds no room in the buffer waits for the commit, like any other operation.
            await until(lambda: spine.health().mailboxes["audit"] >= 900 - BUFFERED_ROWS // 2)
            assert sum(call.done() for call in calls) <= BUFFERED_ROWS // 2
            assert spine.health().journal["buffered_rows"] <= BUFFERED_ROWS
            other.execute("ROLLBACK")
        results = await asyncio.gather(*calls)
        assert all(result.success for result in results)
        await spine.flush()
    assert len(found(sqlite_url, "outcome")) == 900
    assert_intact(sqlite_url)


@pytest.mark.parametrize(("operation", "code"), [("die.now", "IN_DOUBT"), ("die.idempotent", None)])
async def test_a_process_that_dies_inside_a_handler_leaves_a_decision_that_is_closed_once(
    sqlite_url: str, tmp_path: Path, operation: str, code: str | None
) -> None:
    """Two later processes recover at the same time: one INTERRUPTED. The key is in doubt unless repeating is safe."""
    effects = tmp_path / "effects"
    process = load(sqlite_url, 5, 1, operation, effects)
    told = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == -signal.SIGKILL, told
    assert effects.read_text().split() == ["5", "6"]
    assert_intact(sqlite_url)
    (open_,) = unanswered(rows(sqlite_url))
    (decision,) = found(sqlite_url, "decision", decision_id=open_)
    assert (decision["operation"], decision["params"]) == (operation, {"n": 6})

    later = clock(ahead_s=60)
    late = [Spine(sqlite_url, settings=Settings(clock=later)) for _ in range(2)]
    again: list[int] = []
    for spine in late:

        @spine.operation(operation, audit_fields=["n"], idempotent=operation == "die.idempotent")
        async def handler(ctx: OperationContext) -> None:
            again.append(ctx.attempt)

    async with late[0], late[1]:
        await until(lambda: not unanswered(rows(sqlite_url)))
        (outcome,) = found(sqlite_url, "outcome", decision_id=open_)
        assert (outcome["success"], outcome["error_code"]) == (False, "INTERRUPTED")
        repeated = await late[0].execute(
            operation, tenant_id="acme", run_id="run-1", params={"n": 6}, idempotency_key="once"
        )
        assert repeated.error_code == code
        assert again == ([2] if code is None else [])
    assert_intact(sqlite_url)
