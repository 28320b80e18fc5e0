"""Law 2: no outcome without a decision, no decision without a record.

kill -9 anywhere: every effect a caller was told of is in the journal. Buffered operations alone may lose their bounded
tail, and say so.
"""

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

from spine import AuthorityDecision, OperationContext, Spine
from spine.kernel.clock import VirtualClock
from spine.settings import Settings
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
    clock = VirtualClock(time.time_ns() // 1000 + 60_000_000)
    async with Spine(url, settings=Settings(clock=clock)):
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

    clock = VirtualClock(time.time_ns() // 1000 + 60_000_000)
    late = [Spine(sqlite_url, settings=Settings(clock=clock)) for _ in range(2)]
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


@pytest.mark.parametrize("ahead_s", [0, 60])
async def test_the_decisions_of_a_process_that_lives_are_left_alone(sqlite_url: str, ahead_s: int) -> None:
    """A second process on the same database does not close what the first one still works at.

    Not even when the first one's lease has run out, as of a process that was held up: it is known to live.
    """
    release = asyncio.Event()
    clock = VirtualClock(time.time_ns() // 1000 + ahead_s * 1_000_000)
    first, second = Spine(sqlite_url), Spine(sqlite_url, settings=Settings(clock=clock))

    @first.operation("work.long")
    async def long(ctx: OperationContext) -> None:
        await release.wait()

    async with first:
        running = asyncio.ensure_future(first.execute("work.long", tenant_id="acme"))
        await until(lambda: unanswered(rows(sqlite_url)))
        async with second:
            # Its housekeeping sweeps at the start, before it says anything of its own through this question.
            await second.start_run("run-1", tenant_id="acme")
            await second._system.dependencies.recovery.sweep()
            assert unanswered(rows(sqlite_url))
        release.set()
        assert (await running).success
    (outcome,) = found(sqlite_url, "outcome")
    assert outcome["success"]


async def test_a_blocked_loop_does_not_lose_the_lease(sqlite_url: str) -> None:
    """The lease moves on while nothing else of the process does."""
    spine = Spine(sqlite_url)

    def lease() -> int:
        with closing(sqlite3.connect(file_of(sqlite_url))) as db:
            return sum(until for (until,) in db.execute("SELECT lease_until_at FROM instances"))

    @spine.operation("work.block")
    async def block(ctx: OperationContext) -> dict[str, bool]:
        before, give_up = lease(), time.monotonic() + 15
        while lease() == before and time.monotonic() < give_up:
            time.sleep(0.05)  # noqa: ASYNC251  it is to block
        return {"renewed": lease() > before}

    async with spine:
        assert (await spine.execute("work.block", tenant_id="acme")).data == {"renewed": True}
    assert lease() == 0


@pytest.mark.parametrize("durability", ["committed", "buffered"])
async def test_an_operation_that_ends_after_it_was_taken_for_dead_is_recorded_as_it_ended(
    sqlite_url: str, durability: Any
) -> None:
    """Of another machine only the lease tells. Its late end is not lost: the journal and ``why`` have it."""
    release = asyncio.Event()
    clock = VirtualClock(time.time_ns() // 1000 + 60_000_000)
    first, second = Spine(sqlite_url), Spine(sqlite_url, settings=Settings(clock=clock))

    @first.operation("work.long", durability=durability)
    async def long(ctx: OperationContext) -> None:
        await release.wait()

    async with first:
        running = asyncio.ensure_future(first.execute("work.long", tenant_id="acme", run_id="run-1"))
        await until(lambda: unanswered(rows(sqlite_url)))
        with closing(sqlite3.connect(file_of(sqlite_url), isolation_level=None)) as db:
            db.execute("UPDATE instances SET process = 'elsewhere/1/1'")
        async with second:
            await until(lambda: found(sqlite_url, "outcome", error_code="INTERRUPTED"))
            assert "INTERRUPTED" in str(await second.why("run-1"))
        release.set()
        result = await running
        if durability == "committed":
            assert (result.error_code, result.durable) == ("OUTCOME_UNRECORDED", False)
            assert "ran and succeeded" in str(result.error)
            assert "closed its decision as INTERRUPTED" in str(result.error)
        await until(lambda: found(sqlite_url, "outcome.late"))
        told = await first.why("run-1")
        await until(lambda: first.health().journal["unrecorded"] == 0)
    (late,), (decision,) = found(sqlite_url, "outcome.late"), found(sqlite_url, "decision")
    assert (late["decision_id"], late["success"]) == (decision["decision_id"], True)
    assert len(found(sqlite_url, "outcome")) == 1
    (line,) = told.to_dict()["decisions"]
    assert (line["outcome"]["success"], line["outcome"]["error_code"]) == (True, None)
    assert "succeeded late, after another process had recorded it as INTERRUPTED" in str(told)
    assert_intact(sqlite_url)


# -- the moment of the record, seen from inside


async def test_a_decision_is_committed_before_its_handler_starts_and_the_outcome_before_the_caller_hears(
    sqlite_url: str,
) -> None:
    """Fifty callers at once; handlers and callers look into the database themselves, with a connection of their own."""
    spine = Spine(sqlite_url)
    early: list[str] = []

    def look(n: int) -> list[str]:
        decisions = {row["decision_id"] for row in rows(sqlite_url) if row.get("params") == {"n": n}}
        return [row["kind"] for row in rows(sqlite_url) if row.get("decision_id") in decisions]

    @spine.operation("work.async", audit_fields=["n"])
    async def asynchronous(ctx: OperationContext) -> None:
        if look(ctx.params["n"]) != ["decision"]:
            early.append(f"async {ctx.params['n']}")

    @spine.operation("work.sync", audit_fields=["n"])
    def synchronous(ctx: OperationContext) -> None:
        if look(ctx.params["n"]) != ["decision"]:
            early.append(f"sync {ctx.params['n']}")
        raise KeyError("an ending like any other")

    async def caller(n: int) -> None:
        name = "work.async" if n % 2 else "work.sync"
        result = await spine.execute(name, tenant_id="acme", params={"n": n})
        assert result.durable
        if look(n) != ["decision", "outcome"]:
            early.append(f"caller {n}")

    async with spine:
        await asyncio.gather(*[caller(n) for n in range(50)])
    assert early == []


async def test_denials_starts_switches_and_completions_are_committed_before_they_are_told(sqlite_url: str) -> None:
    """Buffered operations too: what denies is never buffered, a switch acts only once it is journaled."""
    spine = Spine(sqlite_url)

    @spine.rule("work.denied")
    def never(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("no", code="NEVER")

    @spine.operation("work.denied", durability="buffered")
    @spine.operation("work.fine", durability="buffered")
    async def handler(ctx: OperationContext) -> None:
        pass

    async with spine:
        await spine.start_run("run-1", tenant_id="acme")
        assert found(sqlite_url, "run.started", run_id="run-1")
        denied = await spine.execute("work.denied", tenant_id="acme", run_id="run-1")
        assert (denied.error_code, denied.durable) == ("NEVER", True)
        assert found(sqlite_url, "decision", decision_id=denied.metadata["decision_id"], final=True)
        unknown = await spine.execute("no.such", tenant_id="acme")
        assert unknown.durable
        assert found(sqlite_url, "decision", decision_id=unknown.metadata["decision_id"])
        fine = await spine.execute("work.fine", tenant_id="acme", run_id="run-1")
        assert (fine.success, fine.durable) == (True, False)
        await spine.halt(reason="a test", actor="law 2")
        assert found(sqlite_url, "governance.changed", to="halted")
        halted = await spine.execute("work.fine", tenant_id="acme", run_id="run-1")
        assert (halted.error_code, halted.durable) == ("HALTED", True)
        assert found(sqlite_url, "decision", decision_id=halted.metadata["decision_id"])
        refused = await spine.start_run("run-2", tenant_id="acme")
        assert not refused.allowed
        assert found(sqlite_url, "run.denied", run_id="run-2") or found(
            sqlite_url, "run.denied", claimed_run_id="run-2"
        )
        completed = await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        assert found(sqlite_url, "tx.committed", tx_id=completed.transaction_id)


FULL_DISK = """
import asyncio, json, resource, sys
from spine import OperationContext, Spine
from spine.governance.transactions import TransactionFailed

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main(url):
    spine, ran = Spine(url), []

    @spine.operation("work.step")
    async def step(ctx: OperationContext):
        ran.append("step")

    @spine.operation("work.fills")
    async def fills(ctx: OperationContext):
        ran.append("fills")
        limit(0)

    def told(result):
        return [result.success, result.error_code, result.durable, result.metadata.get("decision_id"), len(ran)]

    async with spine:
        lines = {"before": told(await spine.execute("work.step", tenant_id="acme"))}
        lines["fills"] = told(await spine.execute("work.fills", tenant_id="acme"))
        lines["full"] = told(await spine.execute("work.step", tenant_id="acme"))
        lines["start"] = (await spine.start_run("run-1", tenant_id="acme")).code
        try:
            await spine.complete_run("run-2", tenant_id="acme", run_status="succeeded")
        except TransactionFailed as error:
            lines["completion"] = error.code
        lines["health"] = [spine.health().ok, spine.health().journal["unrecorded"]]
        limit(resource.RLIM_INFINITY)
        lines["after"] = told(await spine.execute("work.step", tenant_id="acme"))
        deadline = asyncio.get_running_loop().time() + 15
        while spine.health().journal["unrecorded"] and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        lines["healthy"] = [spine.health().ok, spine.health().journal["unrecorded"]]
    print(json.dumps(lines))

asyncio.run(main(sys.argv[1]))
"""


async def test_on_a_full_disk_nothing_runs_unrecorded_and_what_had_run_is_recorded_when_space_returns(
    sqlite_url: str,
) -> None:
    """A real limit on the size of files, met between a decision and its outcome, lifted later."""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", FULL_DISK, sqlite_url], capture_output=True, timeout=40, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["before"][:3] == [True, None, True]
    success, code, durable, ran_unrecorded, ran = told["fills"]
    assert (success, code, durable, ran) == (False, "OUTCOME_UNRECORDED", False, 2)
    success, code, durable, _, ran = told["full"]
    assert (success, code, durable, ran) == (False, "JOURNAL_UNAVAILABLE", False, 2)
    assert (told["start"], told["completion"]) == ("JOURNAL_UNAVAILABLE", "JOURNAL_UNAVAILABLE")
    assert told["health"] == [False, 1]
    assert told["after"][:2] == [True, None]
    assert told["healthy"] == [True, 0]
    journal = rows(sqlite_url)
    outcome = next(row for row in journal if row["kind"] == "outcome" and row["decision_id"] == ran_unrecorded)
    assert outcome["success"]
    assert not unanswered(journal)
    assert not found(sqlite_url, "run.started")
    assert_intact(sqlite_url)
