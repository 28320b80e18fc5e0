"""A refund desk under one authority: run it with ``python examples/refunds.py``, then ``spine why run-1``."""

from __future__ import annotations

import asyncio

from spine import AuthorityDecision, OperationContext, Spine

spine = Spine()  # SPINE_DATABASE_URL, else ./spine.db


@spine.rule("refunds.*")
def small_refunds_only(ctx: OperationContext) -> AuthorityDecision:
    """More than 100.00 is not for a machine to give away."""
    if ctx.params["amount_cents"] > 10_000:
        return AuthorityDecision.deny("refund over 100.00 needs a person", code="REFUND_LIMIT")
    return AuthorityDecision.allow()


@spine.operation("refunds.issue")
async def issue(ctx: OperationContext) -> dict[str, object]:
    """Where the payment provider would be called."""
    return {"refunded_cents": ctx.params["amount_cents"], "run": ctx.run_id}


async def main() -> None:
    """One run that gets a small refund and is refused a large one, then completes."""
    async with spine:
        await spine.start_run("run-1", tenant_id="acme", agent_id="a7")
        for amount_cents in (4_200, 420_000):
            result = await spine.execute(
                "refunds.issue", tenant_id="acme", run_id="run-1", params={"amount_cents": amount_cents}
            )
            print(amount_cents, "->", result.data if result.success else f"{result.error_code}: {result.error}")
        done = await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        print("completed:", done.phase.value, "events published:", done.events_published)
        print(await spine.why("run-1"))


if __name__ == "__main__":
    asyncio.run(main())
