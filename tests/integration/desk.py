"""A Spine with operations that are easy to hold up, and what holds of every result of them."""

from __future__ import annotations

import asyncio
from typing import Any

from spine import OperationContext, OperationResult, Settings, Spine
from tests.governed import Published, authority_fields


def sound(result: OperationResult, operation: str | None = None) -> OperationResult:
    """What holds of every result, whatever ended the call."""
    assert isinstance(result, OperationResult)
    assert result.decision is not None
    assert authority_fields(result.metadata) == [], result
    assert result.success is (result.error_code is None)
    assert result.success is (result.error is None)
    assert result.duration_ms >= 0
    assert operation is None or result.operation == operation
    return result


class Desk:
    """A Spine with operations whose handlers say when they were entered and leave when told."""

    def __init__(self, url: str, publisher: Any = None, **settings: Any) -> None:
        self.url = url
        self.spine = Spine(url, publisher=publisher or Published(), settings=Settings(**settings))
        self.entered = self.left = 0
        self.leave = asyncio.Event()

        @self.spine.operation("desk.quick")
        async def quick(ctx: OperationContext) -> dict[str, Any]:
            self.entered += 1
            return {"tenant": ctx.tenant_id}

        @self.spine.operation("desk.single", concurrency=1)
        @self.spine.operation("desk.slow")
        async def slow(ctx: OperationContext) -> dict[str, Any]:
            self.entered += 1
            await self.leave.wait()
            self.left += 1
            return {}

    async def execute(self, operation: str = "desk.quick", **call: Any) -> OperationResult:
        return await self.spine.execute(operation, **{"tenant_id": "acme", **call})

    @property
    def credits_in_use(self) -> int:
        return self.spine._system.exchange.credits_in_use


async def complete(desk: Desk, run_id: str, key: str = "") -> Any:
    return await desk.spine.complete_run(run_id, tenant_id="acme", run_status="succeeded", completion_key=key)
