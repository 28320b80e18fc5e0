"""Completing a run: the built-in domains and the user's own LOCAL ones commit together, and are seen together."""

from __future__ import annotations

import sqlite3
from functools import partial
from uuid import UUID

import anyio
import pytest

from spine import RunFacts, Write
from spine.governance.transactions import RunCompletionTransaction
from tests.governed import Published, authority_fields, intact, journal, path_of, query, running, together, until
from tests.integration.billing import TABLES, Local, bill, bills, make, rows_written
from tests.participants import BUILT_IN, complete

pytestmark = pytest.mark.anyio


async def test_a_completion_writes_every_domain_in_one_commit(database_url: str) -> None:
    """Built-in rows, the user's rows, transaction, acknowledgements and event share one unit of the journal."""
    billing = Local("billing", bill, action="send_bill")
    publisher = Published()
    spine = await make(database_url, billing, publisher=publisher)
    async with running(spine):
        await spine.start_run("run-1", tenant_id="acme", agent_id="a7")
        done = await complete(spine, agent_id="a7")
        why = await spine.why("run-1")
    assert done.is_complete
    assert done.all_domains_succeeded
    assert (done.phase, done.events_published) == ("EVENTS_PUBLISHED", ["run.completed"])
    assert [result.domain for result in done.domains] == [*BUILT_IN, "billing"]
    assert all(result.success and result.result_id for result in done.domains)
    for legacy in (done.incident_result, done.policy_result, done.trace_result):
        assert legacy is not None
        assert legacy.success
    assert authority_fields(done.metadata) == []

    assert bills(database_url) == [("run-1", 5)]
    assert rows_written(database_url) == dict.fromkeys(TABLES, 1)
    (run,) = query(database_url, "SELECT state, run_status, tx_id FROM runs")
    assert run == ("committed", "succeeded", done.transaction_id)
    (begun,) = journal(database_url, "tx.begun")
    unit = [body for body in journal(database_url) if body["unit"] == begun["unit"]]
    assert [body["kind"] for body in unit] == [
        "tx.begun",
        *["tx.step"] * 4,
        *["ack"] * 4,
        "event",
        "tx.committed",
        "ack",
        "contract.reconciled",
    ]
    assert [(body["domain"], body["action"], body["status"]) for body in unit if body["kind"] == "ack"] == [
        ("incidents", "create_incident", "SUCCESS"),
        ("policies", "evaluate_policy", "SUCCESS"),
        ("traces", "complete_trace", "SUCCESS"),
        ("billing", "send_bill", "SUCCESS"),
        ("orchestrator", "finalize_run", "SUCCESS"),
    ]
    assert (why.verdict, why.contract["overall"] if why.contract else None) == ("succeeded", "COMPLETE")
    (event,) = publisher.events
    assert (event.run_id, event.tx_id, event.type) == ("run-1", done.transaction_id, "run.completed")
    intact(database_url)


async def test_a_domain_sees_the_facts_of_the_run(sqlite_url: str) -> None:
    """What was completed, what the run's operations came to, and an effect id of its own, fit for a primary key."""
    seer, other = Local("seer", lambda run: []), Local("other", lambda run: [])
    spine = await make(sqlite_url, seer, other)

    async with running(spine):
        await spine.execute("desk.unknown", tenant_id="acme", run_id="run-1")
        done = await complete(
            spine, status="failed", agent_id="a7", error_code="E", error_message="text", completion_key="key"
        )
    (facts,) = seer.planned
    assert (facts.run_id, facts.tenant_id, facts.run_status, facts.agent_id) == ("run-1", "acme", "failed", "a7")
    assert (facts.error_code, facts.error_message, facts.completion_key) == ("E", "text", "key")
    assert (facts.operations, facts.operations_denied, facts.operations_failed) == (1, 1, 0)
    assert facts.tx_id == done.transaction_id
    assert UUID(facts.effect_id) != UUID(other.planned[0].effect_id)
    results = {result.domain: result.result_id for result in done.domains}
    assert results["seer"] == facts.effect_id


async def test_domains_take_part_in_the_order_they_ask_for(sqlite_url: str) -> None:
    """``after`` decides, declaration order where that leaves a choice; results and records are in that order."""
    order: list[str] = []

    def domain(name: str, *after: str) -> Local:
        def plan(run: RunFacts) -> list[Write]:
            order.append(name)
            return []

        return Local(name, plan, after=after)

    spine = await make(
        sqlite_url, domain("last", "second", "traces"), domain("second", "first"), domain("first"), domain("free")
    )
    async with running(spine):
        done = await complete(spine)
    assert order == ["first", "second", "last", "free"]
    names = [result.domain for result in done.domains]
    assert names == [*BUILT_IN, *order]
    assert [body["domain"] for body in journal(sqlite_url, "tx.step")] == names


async def test_a_later_write_sees_an_earlier_ones_rows(database_url: str) -> None:
    """The writes run in order in one transaction: an UPDATE finds what a domain before it inserted."""

    def discount(run: RunFacts) -> list[Write]:
        return [
            Write("UPDATE bills SET cents = cents - 1 WHERE run_id = :run", {"run": run.run_id}),
            Write("DELETE FROM bills WHERE run_id = :run", {"run": "no such run"}, rows=0),
            Write("UPDATE bills SET cents = cents WHERE cents > :least", {"least": -1}, rows=None),
        ]

    spine = await make(database_url, Local("billing", bill), Local("discount", discount, after=["billing"]))
    async with running(spine):
        assert (await complete(spine)).is_complete
    assert bills(database_url) == [("run-1", 4)]


async def test_completing_a_run_that_was_never_started_starts_it_too(sqlite_url: str) -> None:
    """The legacy worker always does: the implicit start is part of the same commit."""
    spine = await make(sqlite_url, Local("billing", bill))
    async with running(spine):
        done = await complete(spine, agent_id="a7")
        assert done.is_complete
        assert (await spine.why("run-1")).verdict == "succeeded"
    (started,) = journal(sqlite_url, "run.started")
    assert started["implicit"] is True
    assert started["unit"] == journal(sqlite_url, "tx.committed")[0]["unit"]


async def test_a_completion_may_leave_its_events_out(sqlite_url: str) -> None:
    """``skip_events``: committed, nothing published, nothing pending."""
    publisher = Published()
    spine = await make(sqlite_url, publisher=publisher)
    async with running(spine):
        done = await RunCompletionTransaction(spine.ask).execute("run-1", "acme", "succeeded", skip_events=True)
    assert (done.phase, done.events_published) == ("COMMITTED", [])
    assert publisher.events == []
    assert journal(sqlite_url, "event") == []


async def test_no_other_connection_ever_sees_a_part_of_a_completion(sqlite_url: str) -> None:
    """Somebody who reads all tables in one snapshot, again and again, finds each run everywhere or nowhere."""
    spine = await make(sqlite_url, Local("billing", bill))
    done = False
    looks = 0

    def look() -> None:
        nonlocal looks
        connection = sqlite3.connect(path_of(sqlite_url), isolation_level=None)
        try:
            while not done:
                connection.execute("BEGIN")
                seen = [
                    connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                    for table in (*TABLES, "bills", "outbox", "transactions")
                ]
                committed = connection.execute("SELECT count(*) FROM journal WHERE kind = 'tx.committed'").fetchone()[0]
                connection.execute("COMMIT")
                assert set(seen) == {committed}, (seen, committed)
                looks += 1
        finally:
            connection.close()

    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, look)
        await until(lambda: looks > 0)
        for number in range(5):
            await together(*[partial(complete, spine, f"run-{number}-{n}") for n in range(20)])
        await until(lambda seen=looks: looks > seen)
        done = True
    assert len(bills(sqlite_url)) == 100
