"""A completion that must not begin is refused, on the record, before any domain outside hears of it."""

from __future__ import annotations

from functools import partial

import pytest

from spine import RollbackNotSupportedError
from tests.governed import intact, journal, query, running, together
from tests.participants import Irreversible, Remote, Sender, World, complete, failure, over

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_a_domain_that_cannot_be_undone_is_refused_before_anything_happens(sqlite_url: str, world: World) -> None:
    """RollbackNotSupportedError names it and the way out: nobody is called, nothing begins, and it is recorded."""
    spine = over(sqlite_url, Remote(world), Irreversible(world))
    async with running(spine):
        for run_id in ("run-1", "run-2"):
            with pytest.raises(RollbackNotSupportedError, match=r"'mail' has no rollback.*POST"):
                await complete(spine, run_id)
        await spine.start_run("run-3", tenant_id="acme")
        with pytest.raises(RollbackNotSupportedError):
            await complete(spine, "run-3")
        assert (await spine.why("run-3")).verdict == "pending"
    assert world.calls == []
    assert query(sqlite_url, "SELECT count(*) FROM transactions") == [(0,)]
    assert query(sqlite_url, "SELECT run_id, state FROM runs ORDER BY run_id") == [
        ("run-1", "open"),
        ("run-2", "open"),
        ("run-3", "open"),
    ]
    refused = journal(sqlite_url, "tx.refused")
    assert [(body["run_id"], body["code"]) for body in refused] == [
        (run_id, "ROLLBACK_NOT_SUPPORTED") for run_id in ("run-1", "run-2", "run-3")
    ]
    intact(sqlite_url)
    mended = over(sqlite_url, Remote(world))
    async with running(mended):
        assert (await complete(mended)).is_complete


async def test_a_refused_beginning_is_on_record_however_many_come_at_once(sqlite_url: str, world: World) -> None:
    """Refused completions of runs that nobody has started, from two Spines: a record of each, and one start of each."""
    spines = [over(sqlite_url, Irreversible(world)) for _ in range(2)]

    async def one(number: int) -> None:
        with pytest.raises(RollbackNotSupportedError):
            await complete(spines[number % 2], f"run-{number // 4}", completion_key=str(number))

    async with running(*spines):
        await together(*[partial(one, number) for number in range(40)])
    assert sorted(int(body["completion_key"]) for body in journal(sqlite_url, "tx.refused")) == list(range(40))
    assert len(journal(sqlite_url, "run.started")) == 10


async def test_a_completion_that_stands_is_given_even_when_none_could_begin(sqlite_url: str, world: World) -> None:
    """What was committed before a domain lost its rollback is answered from the record."""
    before = over(sqlite_url, Remote(world))
    async with running(before):
        done = await complete(before)
    after = over(sqlite_url, Irreversible(world))
    async with running(after):
        assert (await complete(after)).transaction_id == done.transaction_id


async def test_another_tenants_run_is_not_completed_and_no_domain_hears_of_it(sqlite_url: str, world: World) -> None:
    """TENANT_MISMATCH before anything."""
    spine = over(sqlite_url, Remote(world), Sender(world))
    async with running(spine):
        await spine.start_run("run-1", tenant_id="acme")
        error = await failure(spine, tenant_id="other")
    assert error.code == "TENANT_MISMATCH"
    assert world.calls == []
