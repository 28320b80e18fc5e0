"""A process under load, made to be killed: it says on its output what its callers were told, the moment they were.

``python load.py URL FIRST CALLERS KIND EFFECTS``; every line is one JSON object, written at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

import structlog

from spine import AuthorityDecision, OperationContext, OperationResult, Spine

structlog.configure(
    processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(sys.stderr)
)


def tell(what: str, **facts: Any) -> None:
    os.write(1, json.dumps({"what": what, "at": time.monotonic(), **facts}).encode() + b"\n")


def make(url: str, effects: int) -> Spine:
    spine = Spine(url)

    def effect(ctx: OperationContext) -> None:
        os.write(effects, f"{ctx.params['n']}\n".encode())

    @spine.rule("work.*")
    def every_seventh_is_denied(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params["n"] % 7 == 3:
            return AuthorityDecision.deny("an unlucky number", code="UNLUCKY")
        return AuthorityDecision.allow()

    @spine.operation("work.step", audit_fields=["n"])
    async def step(ctx: OperationContext) -> dict[str, Any]:
        effect(ctx)
        return {"n": ctx.params["n"]}

    @spine.operation("work.outer", audit_fields=["n"])
    async def outer(ctx: OperationContext) -> OperationResult:
        effect(ctx)
        inner = await ctx.execute("work.step", {"n": ctx.params["n"] + 500_000})
        tell_result(inner, None)
        return inner

    @spine.operation("work.fails", audit_fields=["n"])
    def fails(ctx: OperationContext) -> None:
        effect(ctx)
        raise ValueError("as it must")

    @spine.operation("work.buffered", audit_fields=["n"], durability="buffered")
    async def buffered(ctx: OperationContext) -> None:
        effect(ctx)

    @spine.operation("die.now", audit_fields=["n"])
    async def die(ctx: OperationContext) -> None:
        effect(ctx)
        os.kill(os.getpid(), signal.SIGKILL)

    @spine.operation("die.idempotent", audit_fields=["n"], idempotent=True)
    async def die_again(ctx: OperationContext) -> None:
        effect(ctx)
        os.kill(os.getpid(), signal.SIGKILL)

    return spine


def tell_result(result: OperationResult, run: str | None) -> None:
    tell(
        "operation",
        run=run,
        operation=result.operation,
        decision=result.metadata.get("decision_id"),
        allowed=result.decision is not None and result.decision.allowed,
        success=result.success,
        code=result.error_code,
        durable=result.durable,
    )


async def mixed(spine: Spine, first: int, caller: int) -> None:
    """Runs one after the other: start, a few operations of every ending, completion."""
    number = first + caller * 10_000
    while True:
        run = f"run-{number}"
        started = await spine.start_run(run, tenant_id="acme")
        tell("start", run=run, allowed=started.allowed)
        for name in ("step", "outer", "fails"):
            number += 1
            key = f"key-{number}" if number % 3 == 0 else None
            result = await spine.execute(
                f"work.{name}", tenant_id="acme", run_id=run, params={"n": number}, idempotency_key=key
            )
            tell_result(result, run)
        completed = await spine.complete_run(run, tenant_id="acme", run_status="succeeded")
        tell("completion", run=run, tx=completed.transaction_id, phase=completed.phase.value)


async def buffered(spine: Spine, first: int, caller: int) -> None:
    number = first + caller * 10_000
    while True:
        number += 1
        tell_result(await spine.execute("work.buffered", tenant_id="acme", params={"n": number}), None)


async def die(spine: Spine, first: int, name: str) -> None:
    """Ended in the middle of a handler, by the handler."""
    await spine.execute("work.step", tenant_id="acme", run_id="run-1", params={"n": first})
    tell("dying")
    await spine.execute(name, tenant_id="acme", run_id="run-1", params={"n": first + 1}, idempotency_key="once")


async def main(url: str, first: int, callers: int, kind: str, effects_file: str) -> None:
    effects = os.open(effects_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with make(url, effects) as spine:
        tell("ready")
        if kind.startswith("die."):
            await die(spine, first, kind)
            return
        work = {"mixed": mixed, "buffered": buffered}[kind]
        await asyncio.gather(*[work(spine, first, caller) for caller in range(callers)])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]))
