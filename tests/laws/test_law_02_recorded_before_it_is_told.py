"""Law 2: a decision is committed before its handler starts, an outcome before its caller hears; also on a full disk."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from spine import AuthorityDecision, OperationContext, Spine
from tests.laws.world import assert_intact, found, rows, unanswered

pytestmark = pytest.mark.anyio


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
