"""A commit ends too late for who waits for it: nobody claims to know, and the record says in the end what happened."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from actors import recorder
from spine import Spine, TransactionFailed
from spine.kernel.errors import JournalUnavailable
from tests.governed import clock, intact, journal, query, running, until
from tests.integration.mill import Mill

pytestmark = pytest.mark.anyio


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
