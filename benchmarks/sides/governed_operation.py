"""A governed operation: three rules, a deadline, 300 bytes of parameters, decision and outcome in the journal."""

from __future__ import annotations

import asyncio

from benchmarks.databases import database
from benchmarks.harness import PAYLOAD
from benchmarks.side import arguments, async_rate, report
from spine import AuthorityDecision, OperationContext, Spine
from spine.governance.operations import Durability

CALLERS = 100
OPERATION = "bench.echo"


def governed_spine(url: str, durability: Durability) -> Spine:
    """A Spine with the operation and its three rules, not started."""
    spine = Spine(url)

    @spine.rule("bench.*")
    def has_payload(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.allow() if ctx.params["payload"] else AuthorityDecision.deny("empty", code="EMPTY")

    @spine.rule("bench.*")
    def payload_is_short(ctx: OperationContext) -> AuthorityDecision:
        if len(ctx.params["payload"]) > 10_000:
            return AuthorityDecision.deny("more than 10,000 characters", code="TOO_LONG")
        return AuthorityDecision.allow()

    @spine.rule(OPERATION)
    def tenant_is_known(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.allow() if ctx.tenant_id == "acme" else AuthorityDecision.deny("who?", code="WHO")

    @spine.operation(OPERATION, durability=durability, concurrency=CALLERS)
    async def echo(ctx: OperationContext) -> dict[str, int]:
        return {"length": len(ctx.params["payload"])}

    return spine


async def measure(url: str, durability: Durability, seconds: float) -> dict[str, float]:
    """Calls per second alone and with 100 callers; a buffered rate ends with its last commit."""
    spine = governed_spine(url, durability)
    params = {"payload": PAYLOAD}
    async with spine:
        for number in range(CALLERS):
            await spine.start_run(f"run-{number}", tenant_id="acme", agent_id="bench")

        async def call(number: int) -> None:
            result = await spine.execute(OPERATION, tenant_id="acme", run_id=f"run-{number}", params=params)
            if not result.success:
                raise RuntimeError(f"{OPERATION} ended {result.error_code}: {result.error}; its figure would be a lie")

        await async_rate(call, CALLERS, seconds / 5, spine.flush)
        return {
            "execute_1": await async_rate(call, 1, seconds, spine.flush),
            "execute_100": await async_rate(call, CALLERS, seconds, spine.flush),
        }


def main() -> None:
    options = arguments("--durability", "--database")
    with database(options.database, options.dir) as url:
        report(asyncio.run(measure(url, options.durability or "committed", options.seconds)))


if __name__ == "__main__":
    main()
