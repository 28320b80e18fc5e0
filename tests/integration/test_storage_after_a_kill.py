"""After kill -9 all that was told is there and what was open is closed; what a living process does is left alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from spine import OperationContext
from tests.governed import clock, intact, journal, query, running, until
from tests.integration.mill import Mill

pytestmark = pytest.mark.anyio

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
