"""A Spine with operations that count what they did, and what it promises while its database fails and afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from spine import OperationContext, OperationResult, Settings, Spine, TransactionFailed
from spine.kernel.errors import JournalUnavailable
from tests.governed import Published, authority_fields


class Mill:
    """A Spine that counts what its handlers did; ``during`` is done inside the handler of ``mill.turn``."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.url = url
        self.spine = Spine(url, publisher=Published(), settings=Settings(**settings))
        self.ran = 0
        self.during: Any = None

        @self.spine.operation("mill.grind")
        @self.spine.operation("mill.buffered", durability="buffered")
        async def grind(ctx: OperationContext) -> dict[str, Any]:
            self.ran += 1
            return {}

        @self.spine.operation("mill.turn")
        async def turn(ctx: OperationContext) -> dict[str, Any]:
            self.ran += 1
            self.during()
            return {"turned": self.ran}

    async def execute(self, operation: str = "mill.grind", **call: Any) -> OperationResult:
        result = await self.spine.execute(operation, **{"tenant_id": "acme", **call})
        assert result.decision is not None
        assert authority_fields(result.metadata) == []
        return result

    async def refused_everything(self) -> None:
        """Nothing that needs a record happens, and each caller is told so in its own way."""
        ran, spine = self.ran, self.spine
        result = await self.execute(run_id="run-1")
        assert (result.success, result.error_code, result.durable) == (False, "JOURNAL_UNAVAILABLE", False)
        assert "free" in str(result.error)
        keyed = await self.execute(idempotency_key="k")
        assert keyed.error_code == "JOURNAL_UNAVAILABLE"
        assert self.ran == ran, "a handler ran without its decision"
        started = await spine.start_run("run-2", tenant_id="acme")
        assert (started.allowed, started.code) == (False, "JOURNAL_UNAVAILABLE")
        with pytest.raises(TransactionFailed) as failure:
            await spine.complete_run("run-3", tenant_id="acme", run_status="succeeded")
        assert (failure.value.code, failure.value.phase) == ("JOURNAL_UNAVAILABLE", "FAILED")
        with pytest.raises(JournalUnavailable, match="does not act"):
            await spine.halt(reason="an exercise", actor="ann")
        health = spine.health()
        assert health.governance["state"] == "active"
        assert not health.ok
        assert not health.journal["available"]
        assert health.journal["error"]
        assert health.restarts == 0

    async def works_again(self) -> None:
        """As if nothing had been: the refused run starts, the refused key runs, the completion commits."""
        spine = self.spine
        assert (await self.execute(run_id="run-1", idempotency_key="k")).success
        assert (await spine.start_run("run-2", tenant_id="acme")).allowed
        assert (await spine.complete_run("run-3", tenant_id="acme", run_status="succeeded")).is_complete
        await spine.halt(reason="an exercise", actor="ann")
        await spine.restore(reason="over", actor="ann")
        health = spine.health()
        assert health.ok
        assert health.journal["available"]
        assert health.journal["error"] is None
