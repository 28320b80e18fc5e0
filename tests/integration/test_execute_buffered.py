"""What does not wait for its commit says so, and is durable after a flush or a stop."""

from __future__ import annotations

from typing import Any

import pytest

from spine import AuthorityDecision, OperationContext
from tests.governed import intact, journal, running
from tests.integration.desk import Desk, sound

pytestmark = pytest.mark.anyio


async def test_a_buffered_operation_says_that_it_is_not_durable_yet(desk: Desk) -> None:
    """Its allowed calls do not wait for the commit; what must never be lost - a denial, a new run - still does."""

    @desk.spine.rule("desk.buffered")
    def limit(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("no") if ctx.params.get("deny") else AuthorityDecision.allow()

    @desk.spine.operation("desk.buffered", durability="buffered")
    async def buffered(ctx: OperationContext) -> dict[str, Any]:
        return {}

    async with running(desk.spine):
        assert (await desk.execute("desk.buffered", run_id="run-1")).success
        assert [body["run_id"] for body in journal(desk.url, "run.started")] == ["run-1"]
        denied = sound(await desk.execute("desk.buffered", run_id="run-1", params={"deny": True}))
        assert (denied.error_code, denied.durable) == ("DENIED", True)
        results = [sound(await desk.execute("desk.buffered", run_id="run-1")) for _ in range(100)]
        assert {(result.success, result.durable) for result in results} == {(True, False)}
        await desk.spine.flush()
        assert len(journal(desk.url, "outcome")) == 101
        assert sound(await desk.execute(run_id="run-1")).durable
        await desk.execute("desk.buffered", run_id="run-1")
    assert len(journal(desk.url, "outcome")) == 103, "the stop makes everything durable"
    intact(desk.url)
