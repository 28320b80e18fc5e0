"""A day on a virtual clock, told the same way every time: ``python day.py URL SEED`` prints what its journal holds.

Its callers come one at a time, as law 12 wants it.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from spine import AuthorityDecision, OperationContext, OperationResult, Refused, RunFacts, Spine, Write
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.transactions import TransactionFailed
from spine.kernel.clock import VirtualClock
from spine.publisher import Event
from spine.settings import Settings

START_US = 1_750_000_000_000_000


class Picky:
    name = "picky"
    after = ("incidents",)

    def plan(self, run: RunFacts) -> Sequence[Write]:
        if run.run_id == "run-refused":
            raise Refused("NO", "not this one")
        return []


class Unreliable:
    """Fails the first time, for every event."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    async def publish(self, event: Event) -> None:
        if event.event_id not in self.seen:
            self.seen.add(event.event_id)
            raise ConnectionError("not today")


def make(url: str, clock: VirtualClock, seed: int) -> Spine:
    spine = Spine(url, domains=[Picky()], publisher=Unreliable(), settings=Settings(clock=clock, seed=seed))

    @spine.rule("work.*", version="3")
    def limits(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params["n"] > 5:
            return AuthorityDecision.deny("too many", code="LIMIT").with_condition(str(ctx.params.get("why")))
        return AuthorityDecision.allow()

    @spine.rule("*", id="shadow", mode="shadow")
    def shadow(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("if it counted")

    @spine.operation("work.step", audit_fields=["n", "names"])
    async def step(ctx: OperationContext) -> dict[str, Any]:
        await clock_turn()
        return {"n": ctx.params["n"], "names": sorted({"b", "a", "c"})}

    @spine.operation("work.fails")
    def fails(ctx: OperationContext) -> None:
        raise KeyError("n")

    @spine.operation("work.outer")
    async def outer(ctx: OperationContext) -> OperationResult:
        await ctx.execute("work.step", {"n": 1})
        return await ctx.execute("work.step", {"n": 2, "names": {"z": 1, "y": 2}})

    @spine.operation("work.buffered", durability="buffered")
    async def buffered(ctx: OperationContext) -> None:
        await clock_turn()

    return spine


async def clock_turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def run(url: str, seed: int, crash: bool = False) -> None:
    """Everything a day may hold; the clock moves between the calls."""
    clock = VirtualClock(START_US)
    spine = make(url, clock, seed)

    async def step(name: str, run_id: str | None, key: str | None = None, **params: Any) -> OperationResult:
        return await spine.execute(name, tenant_id="acme", run_id=run_id, params=params, idempotency_key=key)

    async with spine:
        await spine.start_run("run-1", tenant_id="acme", agent_id="a7", expectations=[("audit", "report", 60)])
        for n in (1, 4, 7):
            await step("work.step", "run-1", f"k{n}", n=n)
            await clock.advance(0.25)
        await step("work.step", "run-1", "k1", n=1)
        await step("work.fails", "run-1", n=1)
        await step("work.outer", "run-2", n=1)
        await step("no.such", None)
        for n in range(5):
            await step("work.buffered", "run-2", n=n)
        await clock.advance(0.5)
        await spine.flush()
        if crash:
            next(task for task in asyncio.all_tasks() if task.get_name().startswith("spine.coordinator.")).cancel()
            await clock_turn()
            await clock.advance(1)
        await spine.ask(CreatePolicyEvaluation("run-1", "acme", "failed", 2))
        await spine.ask(EmitLesson("near_threshold", "acme", "event-1", {"metric": "tokens", "at": 0.5}))
        await spine.bypass(reason="a test", actor="law 12", for_s=100)
        await step("work.step", "run-1", n=9)
        await clock.advance(1)
        await spine.restore(reason="a test", actor="law 12")
        await spine.complete_run("run-1", tenant_id="acme", run_status="failed", error_code="E", error_message="no")
        try:
            await spine.complete_run("run-refused", tenant_id="acme", run_status="succeeded")
        except TransactionFailed:
            await clock.advance(1)
        await spine.complete_run("run-1", tenant_id="acme", run_status="failed", error_code="E", error_message="no")
        await spine.degrade(reason="a test", actor="law 12")
        await spine.start_run("run-late", tenant_id="acme")
        await clock.advance(1)


def journal(url: str) -> list[tuple[Any, ...]]:
    """Every row with all its bytes."""
    with closing(sqlite3.connect(Path(url.partition("///")[2]))) as db:
        return db.execute("SELECT * FROM journal ORDER BY seq").fetchall()


def digest(url: str) -> str:
    return hashlib.sha256(repr(journal(url)).encode()).hexdigest()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], int(sys.argv[2])))
    print(digest(sys.argv[1]))
