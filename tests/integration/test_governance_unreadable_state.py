"""When the state cannot be read the last one known holds, and before any was known the rules do."""

from __future__ import annotations

import anyio
import pytest

from spine.governance.facade import RunGovernanceFacade
from spine.kernel.errors import JournalUnavailable
from tests.governed import query, running, until
from tests.integration.governed_shop import OPS, clock, execute, looked, shop


@pytest.mark.anyio
async def test_a_state_that_makes_no_sense_is_governed(sqlite_url: str) -> None:
    """Before any state was known, one that cannot be read governs: rules bind, and operators can set it right."""
    spine = shop(sqlite_url)
    async with running(spine):
        await spine.halt(**OPS)
    query(sqlite_url, "UPDATE governance SET state = 'purple'")
    spine = shop(sqlite_url)
    async with running(spine):
        assert spine.health().governance["state"] == "active"
        with anyio.fail_after(5):
            assert (await execute(spine, None, 11)).error_code == "LIMIT"
            assert (await execute(spine, None, 1)).success
            await spine.degrade(**OPS)
            assert (await execute(spine, "new")).error_code == "DEGRADED_NEW_RUN"


@pytest.mark.anyio
async def test_a_state_that_cannot_be_read_any_more_is_the_last_known_one(database_url: str) -> None:
    """The registry restarts while the state's table is away: halted it was, halted it stays."""
    spine = shop(database_url)
    async with running(spine):
        await spine.halt(**OPS)
        assert (await execute(spine)).error_code == "HALTED"
        query(database_url, "ALTER TABLE governance RENAME TO governance_away")
        registry = spine._system.supervisor._children["registry"]
        assert registry.task is not None
        registry.task.cancel()
        await until(lambda: spine.health().restarts == 1 and spine.health().actors["registry"] == "ready")
        assert (await execute(spine)).error_code == "HALTED"
        assert spine.health().governance["state"] == "halted"
        query(database_url, "ALTER TABLE governance_away RENAME TO governance")
        await spine.restore(**OPS)
        assert (await execute(spine)).success


@pytest.mark.anyio
@pytest.mark.parametrize("work", ["start", "denied start", "report"])
async def test_a_state_that_cannot_be_read_is_not_asked_for_without_end(sqlite_url: str, work: str) -> None:
    """The commit says that the state moved on, the reader cannot tell to what: refused at once, and later done."""
    here, there = shop(sqlite_url), shop(sqlite_url, clock=(virtual := clock()))
    async with running(here, there):
        await looked(virtual)
        if work == "denied start":
            await there.degrade(**OPS)
            await here.restore(**OPS)
        await here.halt(**OPS)

        async def unreadable() -> None:
            raise JournalUnavailable("a table is away")

        reader, there._system.reader.governance = there._system.reader.governance, unreadable  # type: ignore[method-assign]
        with anyio.fail_after(5):
            if work == "report":
                facade = RunGovernanceFacade(there.ask)
                assert await facade.create_policy_evaluation("new", "acme", "succeeded") is None
            else:
                assert (await there.start_run("new", tenant_id="acme")).code == "JOURNAL_UNAVAILABLE"
        there._system.reader.governance = reader  # type: ignore[method-assign]
        assert (await there.start_run("new", tenant_id="acme")).code == "HALTED"
