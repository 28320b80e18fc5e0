"""Law 8: every shim call gives the result, the error type and the record that the async call gives.

It refuses a running loop's thread, survives fork, and cancels abandoned work that has not started.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from uuid import UUID

import pytest

import compat
from compat.operation_registry import get_operation_registry
from compat.run_governance_facade import get_run_governance_facade
from compat.transaction_coordinator import RunCompletionTransaction, TransactionResult, get_transaction_coordinator
from spine import AuthorityDecision, OperationContext, OperationResult, Refused, RunFacts, Spine, Write
from spine.governance.facade import RunGovernanceFacade
from spine.journal.verify import verify
from spine.kernel.errors import LoopThreadError, NotRunning
from tests.compat.records import alike, bodies

SOURCE = UUID(int=7)


class Picky:
    """A domain of a user that says no to some runs and fails for others."""

    name = "picky"
    after = ("incidents",)

    def plan(self, run: RunFacts) -> list[Write]:
        if run.run_id == "run-refused":
            raise Refused("NO_FUNDS", "the account is empty")
        if run.run_id == "run-raises":
            raise ZeroDivisionError("no reason")
        if run.run_id == "run-guard":
            return [Write("DELETE FROM lessons WHERE id = :id", {"id": "none"})]
        return []


def make(url: str) -> Spine:
    spine = Spine(url, domains=[Picky()])

    @spine.rule("refunds.*")
    def small_only(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params["amount"] > 100:
            return AuthorityDecision.deny("too much", code="LIMIT")
        return AuthorityDecision.allow()

    @spine.operation("refunds.issue")
    async def issue(ctx: OperationContext) -> dict[str, object]:
        return {"paid": ctx.params["amount"]}

    @spine.operation("things.break")
    async def breaks(ctx: OperationContext) -> dict[str, object]:
        raise LookupError("not there")

    @spine.operation("things.sleep")
    async def sleeps(ctx: OperationContext) -> dict[str, object]:
        await asyncio.sleep(30)
        return {}

    return spine


class Async:
    """The calls as a coroutine makes them."""

    def __init__(self, spine: Spine) -> None:
        self.execute = spine.execute
        self.complete = RunCompletionTransaction(spine.ask).execute
        self.facade = RunGovernanceFacade(spine.ask)


class Sync:
    """The same calls as a worker's thread makes them."""

    def __init__(self) -> None:
        self.execute = get_operation_registry().execute
        self.complete = get_transaction_coordinator().execute
        self.facade = get_run_governance_facade()


Calls = Async | Sync
RUN: dict[str, str] = {"run_id": "run-1", "tenant_id": "acme"}
NEAR = {"metric": "budget", "threshold_value": 100.0, "current_value": 90.0, "source_event_id": SOURCE}

STORY: list[tuple[str, Callable[[Calls], object]]] = [
    ("an operation", lambda c: c.execute("refunds.issue", **RUN, params={"amount": 5})),
    ("a denial", lambda c: c.execute("refunds.issue", **RUN, params={"amount": 500})),
    ("a rule that raises", lambda c: c.execute("refunds.issue", **RUN, params={})),
    ("a handler that raises", lambda c: c.execute("things.break", **RUN)),
    ("a handler that hangs", lambda c: c.execute("things.sleep", **RUN, timeout_s=1)),
    ("an unknown operation", lambda c: c.execute("no.such", **RUN)),
    ("another tenant", lambda c: c.execute("things.break", run_id="run-1", tenant_id="globex")),
    ("no run", lambda c: c.execute("refunds.issue", tenant_id="acme", params={"amount": 1})),
    ("a key", lambda c: c.execute("refunds.issue", **RUN, params={"amount": 2}, idempotency_key="k")),
    ("the key again", lambda c: c.execute("refunds.issue", **RUN, params={"amount": 2}, idempotency_key="k")),
    (
        "the key for something else",
        lambda c: c.execute("refunds.issue", **RUN, params={"amount": 3}, idempotency_key="k"),
    ),
    ("params that are none", lambda c: c.execute("refunds.issue", **RUN, params=[1])),  # type: ignore[arg-type]
    ("NaN", lambda c: c.execute("refunds.issue", **RUN, params={"amount": float("nan")})),
    ("a timeout that is none", lambda c: c.execute("refunds.issue", **RUN, params={"amount": 1}, timeout_s="x")),  # type: ignore[arg-type]
    ("a negative timeout", lambda c: c.execute("refunds.issue", **RUN, params={"amount": 1}, timeout_s=-1)),
    ("an evaluation", lambda c: c.facade.create_policy_evaluation("run-1", "acme", "succeeded", 3)),
    ("an evaluation of another's run", lambda c: c.facade.create_policy_evaluation("run-1", "globex", "succeeded")),
    ("a lesson", lambda c: c.facade.emit_near_threshold_lesson("acme", utilization=90.0, **NEAR)),
    (
        "a lesson that is no JSON",
        lambda c: c.facade.emit_near_threshold_lesson("acme", utilization=float("nan"), **NEAR),
    ),
    ("a success", lambda c: c.facade.emit_critical_success_lesson("acme", "cost", {"under": 50.0}, SOURCE)),
    ("a completion", lambda c: c.complete(**RUN, run_status="succeeded", agent_id="a7")),
    ("again", lambda c: c.complete(**RUN, run_status="succeeded", agent_id="a7")),
    ("again, another payload", lambda c: c.complete(**RUN, run_status="failed", agent_id="a7")),
    ("another tenant's run", lambda c: c.complete("run-1", "globex", "succeeded")),
    (
        "never started, everything given",
        lambda c: c.complete("run-2", "acme", "failed", "a", "E", "m", "t", True, "s", True),
    ),
    ("refused by a domain", lambda c: c.complete("run-refused", "acme", "succeeded")),
    ("a domain that raises", lambda c: c.complete("run-raises", "acme", "succeeded")),
    ("a write that misses", lambda c: c.complete("run-guard", "acme", "succeeded")),
    ("an empty run id", lambda c: c.complete("", "acme", "succeeded")),
    ("a run id of the wrong type", lambda c: c.complete(5, "acme", "succeeded")),  # type: ignore[arg-type]
    ("a lone surrogate", lambda c: c.complete("run-3", "acme", "failed", error_message="\ud800")),
]


def told(value: object, error: BaseException | None) -> object:
    """What came back, without ids and times."""
    if error is not None:
        extra = {name: getattr(error, name, None) for name in ("phase", "partial_results", "code", "failed_domain")}
        cause = getattr(error, "cause", None)
        return alike([type(error).__name__, str(error), extra, type(cause).__name__, str(cause)])
    if isinstance(value, TransactionResult):
        return alike(["TransactionResult", value.to_dict()])
    if isinstance(value, OperationResult):
        return alike(["OperationResult", asdict(value)])
    return alike([type(value).__name__, str(value)])


async def asynchronously(url: str) -> dict[str, object]:
    answers = {}
    async with make(url) as spine:
        for name, call in STORY:
            calls = Async(spine)
            try:
                pending = call(calls)
                assert isinstance(pending, Awaitable)
                answers[name] = told(await pending, None)
            except Exception as error:
                answers[name] = told(None, error)
            await spine.flush()
    return answers


async def synchronously(url: str) -> dict[str, object]:
    answers = {}

    def work(call: Callable[[Calls], object]) -> object:
        try:
            return told(call(Sync()), None)
        except Exception as error:
            return told(None, error)

    async with make(url) as spine:
        for name, call in STORY:
            answers[name] = await asyncio.to_thread(work, call)
            await spine.flush()
    return answers


@pytest.fixture(autouse=True)
def nothing_connected() -> Iterator[None]:
    yield
    compat.disconnect()


@pytest.mark.anyio
async def test_same_results_same_errors_same_record(database_url: str, tmp_path: Path) -> None:
    other = f"sqlite+aiosqlite:///{tmp_path / 'async.db'}"
    sync, direct = await synchronously(database_url), await asynchronously(other)
    for name, _ in STORY:
        assert sync[name] == direct[name], name
    ours, theirs = await bodies(database_url), await bodies(other)
    assert [body["kind"] for body in ours] == [body["kind"] for body in theirs]
    for one, two in zip(alike(ours), alike(theirs), strict=True):
        assert one == two
    assert verify(database_url).ok


@pytest.mark.anyio
async def test_a_running_loops_thread_is_refused_with_the_async_call_and_nothing_is_recorded(sqlite_url: str) -> None:
    async with make(sqlite_url):
        with pytest.raises(LoopThreadError, match=r"await spine\.complete_run\(\.\.\.\)"):
            get_transaction_coordinator().execute("run-1", "acme", "succeeded")
        with pytest.raises(LoopThreadError, match=r"await spine\.execute\(\.\.\.\)"):
            get_operation_registry().execute("refunds.issue", tenant_id="acme")
        with pytest.raises(LoopThreadError, match="create_policy_evaluation"):
            get_run_governance_facade().create_policy_evaluation("run-1", "acme", "succeeded")
    assert await bodies(sqlite_url) == []


@pytest.mark.anyio
async def test_two_threads_at_once_on_one_run_get_one_completion(sqlite_url: str) -> None:
    async with make(sqlite_url) as spine:
        execute = get_transaction_coordinator().execute
        results = await asyncio.gather(
            *(asyncio.to_thread(execute, "run-1", "acme", "succeeded") for _ in range(2)),
            *(asyncio.to_thread(execute, f"run-{n}", "acme", "succeeded") for n in range(2, 8)),
        )
        await spine.flush()
    assert results[0].transaction_id == results[1].transaction_id
    assert len([b for b in await bodies(sqlite_url) if b["kind"] == "tx.committed"]) == 7


@pytest.mark.anyio
async def test_after_the_stop_a_call_is_refused_and_a_recording_is_none(sqlite_url: str) -> None:
    async with make(sqlite_url) as spine:
        compat.connect(spine)
        await asyncio.to_thread(get_transaction_coordinator().execute, "run-1", "acme", "succeeded")
    with pytest.raises(NotRunning, match="not running"):
        await asyncio.to_thread(get_transaction_coordinator().execute, "run-2", "acme", "succeeded")
    facade = get_run_governance_facade()
    assert await asyncio.to_thread(facade.create_policy_evaluation, "run-1", "acme", "succeeded") is None


@pytest.mark.anyio
async def test_work_abandoned_before_it_started_leaves_no_record(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compat.bridge.GRACE_S", 0.1)
    ended: list[OperationResult] = []

    def impatient() -> None:
        call = get_operation_registry().execute
        ended.append(call("refunds.issue", tenant_id="acme", params={"amount": 1}, timeout_s=0.2))

    async with make(sqlite_url):
        thread = threading.Thread(target=impatient)
        thread.start()
        time.sleep(1.0)  # noqa: ASYNC251  the loop stands still: that is the point
        await asyncio.to_thread(thread.join)
        answer = await asyncio.to_thread(
            get_operation_registry().execute, "refunds.issue", tenant_id="acme", params={"amount": 2}
        )
        assert answer.success
    assert [result.error_code for result in ended] == ["TIMEOUT"]
    assert [body["kind"] for body in await bodies(sqlite_url)] == ["decision", "outcome"]


def process(script: str, url: str) -> None:
    """Run ``script``; it tells by writing to the file ``told``, because events are logged to its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SPINE_DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


FORKED = """
import os, time
from compat.transaction_coordinator import get_transaction_coordinator
def complete(run):
    result = get_transaction_coordinator().execute(run, "acme", "succeeded")
    with open("told", "a") as told:
        told.write(f"{run} {result.is_complete}\\n")
complete("parent-before")
parent = os.getpid()
if os.fork() == 0:
    complete("child")
    while os.getppid() == parent:
        time.sleep(0.05)
    complete("child-after-the-parent")
    os._exit(0)
complete("parent-after")
"""


@pytest.mark.anyio
async def test_it_survives_fork(database_url: str) -> None:
    runs = {"parent-before", "child", "parent-after", "child-after-the-parent"}
    process(FORKED, database_url)
    assert set(Path("told").read_text(encoding="utf-8").splitlines()) == {f"{run} True" for run in runs}
    records = await bodies(database_url)
    assert {body["run_id"] for body in records if body["kind"] == "tx.committed"} == runs
    assert verify(database_url).ok


INTERRUPTED = """
import os, signal, threading, time
from compat.transaction_coordinator import get_transaction_coordinator
from compat.bridge import BRIDGE
get_transaction_coordinator().execute("run-1", "acme", "succeeded")
loop = BRIDGE._own.host.loop
loop.call_soon_threadsafe(time.sleep, 1.0)
time.sleep(0.1)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
began = time.monotonic()
try:
    get_transaction_coordinator().execute("run-2", "acme", "succeeded")
except KeyboardInterrupt:
    open("told", "w").write(f"interrupted {time.monotonic() - began < 0.7}")
get_transaction_coordinator().execute("run-3", "acme", "succeeded")
"""


@pytest.mark.anyio
async def test_ctrl_c_cancels_what_has_not_started(sqlite_url: str) -> None:
    process(INTERRUPTED, sqlite_url)
    assert Path("told").read_text(encoding="utf-8") == "interrupted True"
    completed = [body["run_id"] for body in await bodies(sqlite_url) if body["kind"] == "tx.committed"]
    assert completed == ["run-1", "run-3"]
