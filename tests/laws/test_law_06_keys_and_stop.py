"""Law 6 again: nothing waits for ever. A repeat of a key does not wait for another process, nor a stop for itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spine import OperationContext, Settings, Spine
from spine.kernel.supervisor import Supervisor
from tests.governed import running, until

pytestmark = pytest.mark.anyio


async def test_a_repeat_of_a_key_that_another_spine_works_on_is_told_in_time(sqlite_url: str) -> None:
    """IN_DOUBT within its own deadline, and nothing of it looks at the journal any more."""
    let_go = asyncio.Event()

    def make() -> Spine:
        spine = Spine(sqlite_url)

        @spine.operation("work.hold")
        async def hold(ctx: OperationContext) -> None:
            await let_go.wait()

        return spine

    async def hold(spine: Spine, timeout_s: float) -> Any:
        return await spine.execute("work.hold", tenant_id="acme", idempotency_key="k", timeout_s=timeout_s)

    here, there = make(), make()
    async with running(here, there):
        first = asyncio.ensure_future(hold(here, 30))
        await until(lambda: here.health().decisions["allowed"] == 1)
        result = await hold(there, 0.3)
        assert result.error_code == "IN_DOUBT"
        assert "another process" in str(result.error)
        assert (await there.status())["operations"]["work.hold"]["running"] == 0
        let_go.set()
        assert (await first).success
        assert (await hold(there, 30)).metadata["repeated"]


async def test_a_stop_whose_supervisor_hangs_still_returns_with_a_receipt_for_each_child(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for its supervisor's word no longer than it may, and then tells what is left."""

    async def hangs(self: Supervisor, seconds: float) -> None:
        await asyncio.Event().wait()

    spine = Spine(sqlite_url, settings=Settings(stop_s=0.2, drain_s=0.1))
    await spine.start()
    monkeypatch.setattr(Supervisor, "_shutdown", hangs)
    receipts = await asyncio.wait_for(spine.stop(), 20)
    assert [receipt.child for receipt in receipts] == ["coordinator", "registry", "router", "audit"]
    assert {receipt.end for receipt in receipts} <= {"clean", "forced", "leaked"}
