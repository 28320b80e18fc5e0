"""A shop with one rule, for tests that switch its governance, and the operator who switches it."""

from __future__ import annotations

import time
from typing import Any

from spine import AuthorityDecision, OperationContext, OperationResult, Settings, Spine
from spine.kernel.clock import VirtualClock
from tests.governed import until

OPS: dict[str, Any] = {"reason": "an exercise", "actor": "ann"}

buy = "shop.buy"


def shop(url: str, **settings: Any) -> Spine:
    """A Spine with an operation that a rule denies above 10, and a buffered one."""
    spine = Spine(url, settings=Settings(**settings))

    @spine.rule("shop.*", id="limit")
    def limit(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params.get("amount", 0) > 10:
            return AuthorityDecision.deny("too much", code="LIMIT")
        return AuthorityDecision.allow()

    @spine.operation("shop.buy")
    @spine.operation("shop.look", durability="buffered")
    async def buy(ctx: OperationContext) -> dict[str, Any]:
        return {"bought": True}

    return spine


def clock() -> VirtualClock:
    return VirtualClock(time.time_ns() // 1000)


async def looked(virtual: VirtualClock) -> None:
    """The Spine on this clock has looked for other processes' switches and waits a second for the next look."""
    await until(lambda: any(moment == 1.0 for moment, *_ in virtual._sleepers))


async def execute(spine: Spine, run_id: str | None = None, amount: int = 1, operation: str = buy) -> OperationResult:
    return await spine.execute(operation, tenant_id="acme", run_id=run_id, params={"amount": amount})
