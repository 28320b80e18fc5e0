"""Several processes, one authority: a switch binds every one of them from its commit."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest

from spine.governance.facade import RunGovernanceFacade
from tests.governed import intact, journal, running, together, until
from tests.integration.governed_shop import OPS, buy, clock, execute, looked, shop


@pytest.mark.anyio
async def test_a_switch_elsewhere_binds_the_next_operation_here(database_url: str) -> None:
    """A decision under an older epoch is not written but decided again: the very next call is bound."""
    here, there = shop(database_url), shop(database_url)
    async with running(here, there):
        assert (await execute(there, "run-1")).success
        await here.halt(**OPS)
        assert (await execute(there, "run-1")).error_code == "HALTED"
        await here.restore(**OPS)
        assert (await execute(there, "run-1")).success
        await here.bypass(**OPS)
        assert (await execute(there, "run-1", 11)).success
        await here.restore(**OPS)
        assert (await execute(there, "run-1", 11)).error_code == "LIMIT"


@pytest.mark.anyio
async def test_a_switch_elsewhere_binds_the_next_start_here(database_url: str) -> None:
    """A start is decided under the state that is committed: refused once degraded, and no longer once restored."""
    here, there = shop(database_url), shop(database_url)
    async with running(here, there):
        await here.degrade(**OPS)
        assert (await there.start_run("run-1", tenant_id="acme")).code == "DEGRADED_NEW_RUN"
        await here.restore(**OPS)
        assert (await there.start_run("run-1", tenant_id="acme")).allowed
        await here.halt(**OPS)
        assert (await there.start_run("run-2", tenant_id="acme")).code == "HALTED"
        await here.restore(**OPS)
        assert (await there.start_run("run-2", tenant_id="acme")).allowed


@pytest.mark.anyio
@pytest.mark.parametrize("refused", ["unknown", "invalid"])
async def test_a_refused_call_starts_no_run_behind_a_switch_elsewhere(database_url: str, refused: str) -> None:
    """What is refused without asking any rule is decided under the committed state too: degraded starts no run."""
    here, there = shop(database_url), shop(database_url, clock=(virtual := clock()))
    async with running(here, there):
        await looked(virtual)
        await here.degrade(**OPS)
        if refused == "unknown":
            result = await execute(there, "new", operation="shop.steal")
            assert result.error_code == "UNKNOWN_OPERATION"
        else:
            result = await there.execute(buy, tenant_id="acme", run_id="new", params=[])  # type: ignore[arg-type]
            assert result.error_code == "INVALID_PARAMS"
        assert (await execute(there, "new")).error_code == "DEGRADED_NEW_RUN"
    decided, _ = journal(database_url, "decision")
    assert (decided["run_id"], decided["epoch"]) == ("new", 2)
    assert journal(database_url, "run.started") == []


@pytest.mark.anyio
async def test_a_report_behind_a_switch_elsewhere_starts_its_run_flagged(database_url: str) -> None:
    """A report is always accepted; the run that it starts carries the state that is committed, not the last known."""
    here, there = shop(database_url), shop(database_url, clock=(virtual := clock()))
    async with running(here, there):
        await looked(virtual)
        await here.degrade(**OPS)
        assert await RunGovernanceFacade(there.ask).create_policy_evaluation("new", "acme", "succeeded")
    (started,) = journal(database_url, "run.started")
    assert (started["epoch"], started["authority_code"], started["authority_degraded"]) == (2, "DEGRADED", True)


@pytest.mark.anyio
async def test_a_switch_elsewhere_binds_buffered_operations_here_within_a_second(sqlite_url: str) -> None:
    """Who never waits for a commit learns of a halt all the same: by its own commits, or by looking once a second."""
    virtual = clock()
    here, there = shop(sqlite_url), shop(sqlite_url, clock=virtual)
    async with running(here, there):
        assert (await execute(there, operation="shop.look")).success
        await here.halt(**OPS)
        await execute(there, operation="shop.look")
        await there.flush()
        await until(lambda: there.health().governance["state"] == "halted", clock=virtual)
        assert virtual.monotonic() <= 3
        assert (await execute(there, operation="shop.look")).error_code == "HALTED"


@pytest.mark.anyio
async def test_a_buffered_decision_of_the_old_epoch_that_comes_in_behind_a_halt_says_so(sqlite_url: str) -> None:
    """Within one process too: whatever the journal holds behind the switch was decided under it, or is marked late."""
    spine = shop(sqlite_url)
    stop = False

    async def work() -> None:
        while not stop:
            await execute(spine, operation="shop.look")

    async with running(spine), anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(work)
        for switch in (spine.halt, spine.restore) * 5:
            await switch(**OPS)
            before = spine.health().journal["units"]
            await until(lambda before=before: spine.health().journal["units"] > before + 20)
        stop = True
    check_epochs(journal(sqlite_url))


@pytest.mark.anyio
async def test_concurrent_switches_from_two_processes_make_one_chain(database_url: str) -> None:
    """Each epoch is set once, each from the state before it."""
    here, there = shop(database_url), shop(database_url)
    async with running(here, there):
        switches = [partial(getattr(s, name), **OPS) for name in ("halt", "degrade", "restore") for s in (here, there)]
        states = await together(*switches * 3)
    assert sorted(state.epoch for state in states) == list(range(2, 20))
    check_epochs(journal(database_url))


def check_epochs(bodies: list[dict[str, Any]]) -> None:
    """Walk the journal: each switch follows the one before, each decision is of the epoch it stands in.

    Only what ran without waiting for its record may come late, and then says so.
    """
    mode, epoch = "active", 1
    for body in bodies:
        if body["kind"] == "governance.changed":
            assert (body["from"], body["epoch"]) == (mode, epoch + 1), body
            mode, epoch = body["to"], body["epoch"]
        elif body["kind"] == "decision" and body.get("late"):
            assert body["durability"] == "buffered"
            assert body["epoch"] < epoch
        elif body["kind"] == "decision":
            assert body["epoch"] == epoch, (mode, epoch, body)
            assert (body["allowed"], body["code"]) in {
                "active": [(True, "ALLOWED")],
                "degraded": [(True, "DEGRADED"), (False, "DEGRADED_NEW_RUN")],
                "halted": [(False, "HALTED")],
                "bypassed": [(True, "BYPASSED")],
            }[mode], (mode, body)
        elif body["kind"] == "run.started":
            assert body["epoch"] == epoch
            assert mode in ("active", "bypassed"), body
        elif body["kind"] == "run.denied":
            assert (body["epoch"], body["code"]) in [(epoch, "HALTED"), (epoch, "DEGRADED_NEW_RUN")], body
            assert body["code"] == {"halted": "HALTED", "degraded": "DEGRADED_NEW_RUN"}[mode], body


WORKER = """
import asyncio, sys
from spine import AuthorityDecision, Spine

async def main(url, name):
    spine = Spine(url)

    @spine.operation("load.work")
    async def work(ctx):
        return {}

    stop, codes = False, set()

    async def call(n):
        done = 0
        while not stop:
            done += 1
            result = await spine.execute("load.work", tenant_id="acme", run_id=f"{name}-{n}" if n % 2 else None)
            codes.add(result.error_code)
            if n == 0:
                await spine.start_run(f"{name}-start-{done}", tenant_id="acme")

    async with spine:
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        calls = [asyncio.create_task(call(n)) for n in range(8)]
        for number in range(6):
            for switch in (spine.degrade, spine.halt, spine.bypass, spine.restore):
                await switch(reason=f"{name} {number}", actor=name)
                await spine.execute("load.work", tenant_id="acme")
        stop = True
        await asyncio.gather(*calls)
    print(*sorted(map(str, codes)), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_two_processes_switch_under_load_and_no_decision_of_an_older_epoch_follows_a_switch(database_url: str) -> None:
    """Real processes, real contention: in the journal's order every decision is of the state that stands there."""
    command = [sys.executable, "-c", WORKER, database_url]
    workers = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        told = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            out, _ = worker.communicate(timeout=50)
            assert worker.returncode == 0
            told.append(set(out.split()))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    bodies = journal(database_url)
    switches = [body for body in bodies if body["kind"] == "governance.changed"]
    assert len(switches) == 48
    assert any(one["actor"] != other["actor"] for one, other in pairwise(switches)), "they never met"
    assert all(codes <= {"None", "HALTED", "DEGRADED_NEW_RUN"} for codes in told), told
    check_epochs(bodies)
    intact(database_url)
