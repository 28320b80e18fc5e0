"""A run completed again, or by many at once: one transaction, one result, and a conflict where the payloads differ."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import pytest

from spine import CompletionConflict, OperationContext, Refused, Spine, TransactionFailed
from tests.governed import Published, intact, journal, query, running, together
from tests.integration.billing import Local, bill, bills, make, raises
from tests.participants import complete

pytestmark = pytest.mark.anyio


async def test_the_same_completion_again_gives_the_stored_result(database_url: str) -> None:
    """Now and in the next process: one transaction, one row of each, the same answer."""
    domain = Local("billing", bill)
    spine = await make(database_url, domain)
    async with running(spine):
        first = await complete(spine, error_message="text")
        again = await complete(spine, error_message="text")
    other = await make(database_url, domain)
    async with running(other):
        later = await complete(other, error_message="text")
    assert first.to_dict() == again.to_dict() == later.to_dict()
    assert len(domain.planned) == 1
    assert len(journal(database_url, "tx.begun")) == 1
    assert bills(database_url) == [("run-1", 5)]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"status": "failed"}, "run_status 'succeeded', now 'failed'"),
        ({"agent_id": "a8"}, "agent_id None, now 'a8'"),
        ({"error_code": "E", "agent_id": "a8"}, "agent_id None, now 'a8'; error_code None, now 'E'"),
        ({"error_message": "text\n" + "x" * 10_000}, "error_message None, now 'text\\nxxx"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_another_payload_under_the_same_key_is_a_conflict(
    sqlite_url: str, other: dict[str, Any], told: str
) -> None:
    """CompletionConflict names run, key and what differs, and changes nothing; another key is another completion."""
    spine = await make(sqlite_url, Local("billing", bill))
    async with running(spine):
        first = await complete(spine)
        before = journal(sqlite_url)
        with pytest.raises(CompletionConflict, match="run-1") as raised:
            await complete(spine, **other)
        assert f"with another payload: {told}" in str(raised.value)
        assert len(str(raised.value)) < 700
        *kept, refused = journal(sqlite_url)
        assert kept == before
        assert (refused["kind"], refused["code"]) == ("tx.refused", "COMPLETION_CONFLICT")
        second = await complete(spine, completion_key="correction", **other)
        assert second.is_complete
        assert second.transaction_id != first.transaction_id
        assert (await complete(spine)).transaction_id == first.transaction_id
    assert bills(sqlite_url) == [("run-1", 5)] * 2
    intact(sqlite_url)


async def test_a_conflict_is_told_where_only_what_is_not_recorded_differs(sqlite_url: str) -> None:
    """A message is recorded up to a length: beyond it nothing can be named but the digests; nor can a damaged row."""
    spine = await make(sqlite_url, Local("billing", bill))
    async with running(spine):
        await complete(spine, error_message="x" * 10_000)
        with pytest.raises(CompletionConflict, match=r"another payload \(digest"):
            await complete(spine, error_message="x" * 10_001)
        query(sqlite_url, "UPDATE journal SET body = '{' WHERE kind = 'tx.begun'")
        with pytest.raises(CompletionConflict, match=r"another payload \(digest"):
            await complete(spine, status="failed")


async def test_another_payload_after_an_abort_is_a_new_attempt(sqlite_url: str) -> None:
    """What was rolled back binds nobody."""
    spine = await make(
        sqlite_url, Local("faulty", lambda run: raises(Refused("NO", "no"))(run) if run.error_code else [])
    )
    async with running(spine):
        with pytest.raises(TransactionFailed):
            await complete(spine, status="failed", error_code="E")
        done = await complete(spine)
    assert done.is_complete
    assert [body["attempt"] for body in journal(sqlite_url, "tx.begun")] == [1, 2]


async def test_many_identical_completions_at_once_are_one(database_url: str) -> None:
    """From two processes: all get the same result, the domain's rows are there once, one event."""
    published = [Published(), Published()]
    here, there = [await make(database_url, Local("billing", bill), publisher=one) for one in published]
    async with running(here, there):
        with anyio.fail_after(20):
            results = await together(*[partial(complete, spine) for spine in (here, there)] * 10)
    assert len({result.transaction_id for result in results}) == 1
    assert all(result.is_complete for result in results)
    assert bills(database_url) == [("run-1", 5)]
    assert len(journal(database_url, "tx.committed")) == len(journal(database_url, "event")) == 1
    assert {event.event_id for one in published for event in one.events} == {
        journal(database_url, "event")[0]["event_id"]
    }
    intact(database_url)


async def test_conflicting_completions_at_once_have_one_winner(database_url: str) -> None:
    """Ten different payloads under one key: one commits, nine are told of the conflict."""
    here, there = [await make(database_url, Local("billing", bill)) for _ in range(2)]
    ends: list[str] = []

    async def one(spine: Spine, number: int) -> None:
        try:
            await complete(spine, error_code=f"E{number}")
            ends.append("committed")
        except CompletionConflict:
            ends.append("conflict")

    async with running(here, there):
        with anyio.fail_after(20):
            await together(*[partial(one, (here, there)[n % 2], n) for n in range(10)])
    assert sorted(ends) == ["committed", *["conflict"] * 9]
    assert bills(database_url) == [("run-1", 5)]
    intact(database_url)


async def test_a_completion_and_operations_of_its_run_at_the_same_time_are_all_recorded(sqlite_url: str) -> None:
    """Completing does not close the run to what is still on its way; everything keeps its order in one chain."""
    spine = Spine(sqlite_url, publisher=Published())

    @spine.operation("desk.quick")
    async def quick(ctx: OperationContext) -> dict[str, Any]:
        return {}

    async with running(spine):
        calls = [partial(spine.execute, "desk.quick", tenant_id="acme", run_id="run-1") for _ in range(20)]
        *results, done = await together(*calls, partial(complete, spine))
        assert all(result.success for result in results)
        assert done.is_complete
        assert (await spine.why("run-1")).verdict == "succeeded"
    assert len(journal(sqlite_url, "run.started")) == 1
    intact(sqlite_url)
