"""Completing a run: the built-in domains and the user's own LOCAL ones commit together, or nothing of them does."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import pytest

from spine import (
    CompletionConflict,
    OperationContext,
    Refused,
    RunFacts,
    Settings,
    Spine,
    TransactionFailed,
    TransactionResult,
    Write,
)
from spine.governance.transactions import RunCompletionTransaction
from spine.kernel.errors import ConfigurationError
from tests.governed import (
    Published,
    authority_fields,
    intact,
    journal,
    path_of,
    query,
    running,
    together,
    until,
)

pytestmark = pytest.mark.anyio

BILLS = "CREATE TABLE IF NOT EXISTS bills (id TEXT PRIMARY KEY, run_id TEXT NOT NULL, cents INTEGER NOT NULL)"
BUILT_IN = ("incidents", "policies", "traces")
TABLES = ("incidents", "policy_evaluations", "traces")


class Local:
    """A user's domain; ``plan`` does what the test says."""

    def __init__(
        self, name: str, plan: Callable[[RunFacts], Any], *, after: Sequence[str] = (), action: str = ""
    ) -> None:
        self.name = name
        self.after = tuple(after)
        self.does = plan
        self.planned: list[RunFacts] = []
        if action:
            self.action = action

    def plan(self, run: RunFacts) -> Sequence[Write]:
        self.planned.append(run)
        found: Sequence[Write] = self.does(run)
        return found


def bill(run: RunFacts) -> list[Write]:
    return [
        Write(
            "INSERT INTO bills (id, run_id, cents) VALUES (:id, :run, :cents)",
            {"id": run.effect_id, "run": run.run_id, "cents": 5},
        )
    ]


def raises(error: BaseException) -> Callable[[RunFacts], Any]:
    def plan(run: RunFacts) -> list[Write]:
        raise error

    return plan


async def make(url: str, *domains: Local, publisher: Any = None, **settings: Any) -> Spine:
    """A Spine over a database that has the user's table."""
    spine = Spine(url, domains=domains, publisher=publisher or Published(), settings=Settings(**settings))
    async with running(spine):
        query(url, BILLS)
    return spine


async def complete(spine: Spine, run_id: str = "run-1", status: str = "succeeded", **call: Any) -> TransactionResult:
    return await spine.complete_run(run_id, **{"tenant_id": "acme", "run_status": status, **call})


def bills(url: str) -> list[tuple[Any, ...]]:
    return query(url, "SELECT run_id, cents FROM bills ORDER BY run_id, cents")


def rows_written(url: str) -> dict[str, int]:
    return {table: query(url, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


# -- all


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


# -- or nothing


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text either")


def writes(*given: Any) -> Callable[[RunFacts], Any]:
    return lambda run: list(given)


FAULTS: dict[str, tuple[Callable[[RunFacts], Any], str, str]] = {
    "raises": (raises(KeyError("absent")), "KeyError", "absent"),
    "raises unprintably": (raises(Unprintable()), "Unprintable", "Unprintable"),
    "refuses": (raises(Refused("NO_CREDIT", "the account is empty")), "NO_CREDIT", "the account is empty"),
    "refuses oddly": (raises(Refused(5, ValueError("odd"))), "5", "odd"),  # type: ignore[arg-type]
    "returns no writes": (lambda run: 5, "TypeError", "int"),
    "returns None": (lambda run: None, "TypeError", "NoneType"),
    "returns text": (lambda run: "INSERT", "TypeError", "str"),
    "returns something else": (writes("INSERT INTO bills VALUES (1, 2, 3)"), "TypeError", "str"),
    "changes no row": (writes(Write("UPDATE bills SET cents = 1 WHERE id = 'none'")), "WRITE_GUARD", "0 rows where 1"),
    "changes too many rows": (
        writes(
            Write("INSERT INTO bills VALUES ('a', 'x', 1), ('b', 'x', 1)", rows=2),
            Write("UPDATE bills SET cents = 2 WHERE run_id = 'x'"),
        ),
        "WRITE_GUARD",
        "2 rows where 1",
    ),
    "is not SQL": (writes(Write("INSERT INTO nowhere VALUES (1)")), "WRITE_GUARD", "nowhere"),
    "violates a constraint": (writes(Write("INSERT INTO bills VALUES ('a', NULL, 1)")), "WRITE_GUARD", "bills"),
    "lacks a parameter": (writes(Write("INSERT INTO bills VALUES (:id, 'x', 1)")), "WRITE_GUARD", "id"),
    "ends the transaction": (writes(Write("COMMIT")), "WRITE_GUARD", "COMMIT"),
    "only reads": (writes(Write("SELECT * FROM bills")), "WRITE_GUARD", "SELECT"),
    "two statements": (
        writes(Write("INSERT INTO bills VALUES ('a', 'x', 1); DELETE FROM bills", rows=None)),
        "WRITE_GUARD",
        "statement",
    ),
    "touches the record": (writes(Write("DELETE FROM journal", rows=None)), "WRITE_GUARD", "table journal is Spine's"),
}


# What goes wrong in a statement goes wrong in each database in its own way.
IN_SQL = [fault for fault, (_, code, _) in FAULTS.items() if code == "WRITE_GUARD"]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *(("sqlite", fault) for fault in FAULTS),
        *(pytest.param("postgresql", fault, marks=pytest.mark.postgresql) for fault in IN_SQL),
    ],
)
async def test_one_domain_that_fails_rolls_the_whole_completion_back_visibly(
    request: pytest.FixtureRequest, kind: str, fault: str
) -> None:
    """Nothing of any domain is written and no event exists; journal, ``why`` and the error say which, how and why."""
    database_url: str = request.getfixturevalue(f"{kind}_url")
    plan, code, text = FAULTS[fault]
    broken = True
    publisher = Published()

    def sometimes(run: RunFacts) -> Any:
        return plan(run) if broken else []

    late = Local("late", lambda run: [], after=["faulty"])
    spine = await make(
        database_url, Local("billing", bill), Local("faulty", sometimes, after=["billing"]), late, publisher=publisher
    )
    async with running(spine):
        await spine.start_run("run-1", tenant_id="acme")
        with anyio.fail_after(5), pytest.raises(TransactionFailed) as failure:
            await complete(spine)
        error = failure.value
        assert (error.failed_domain, error.code, error.phase) == ("faulty", code, "ROLLED_BACK")
        assert "run-1" in error.message
        assert text in error.message
        assert [result.domain for result in error.domains] == [*BUILT_IN, "billing", "faulty", "late"]
        assert not any(result.success for result in error.domains)
        assert error.partial_results["phase"] == "ROLLED_BACK"
        assert authority_fields(error.partial_results["metadata"]) == []
        if code in ("KeyError", "Unprintable", "NO_CREDIT"):
            assert error.cause is not None
            assert error.__cause__ is error.cause

        assert bills(database_url) == []
        assert rows_written(database_url) == dict.fromkeys(TABLES, 0)
        assert journal(database_url, "event", "tx.committed") == []
        assert query(database_url, "SELECT state FROM runs") == [("aborted",)]
        (aborted,) = journal(database_url, "tx.aborted")
        assert (aborted["failed_domain"], aborted["code"], aborted["state"]) == ("faulty", code, "ABORTED")
        assert text in aborted["error"]
        assert {body["state"] for body in journal(database_url, "tx.step")} <= {"PLANNED", "ROLLED_BACK"}
        acks = [body for body in journal(database_url, "ack") if body["tx_id"] == error.transaction_id]
        assert {(body["domain"], body["status"]) for body in acks} == {
            ("faulty", "FAILED"),
            ("faulty", "ROLLED_BACK"),
            ("orchestrator", "FAILED"),
        }
        why = await spine.why("run-1")
        assert (why.verdict, why.cause.code) == ("rolled_back", code)
        assert "faulty" in why.cause.text
        assert text in why.cause.text

        # Once its cause is gone the run can be completed: a new attempt, linked to the one before.
        broken = False
        done = await complete(spine)
        assert done.is_complete
        assert (await spine.why("run-1")).verdict == "succeeded"
    assert bills(database_url) == [("run-1", 5)]
    first, second = journal(database_url, "tx.begun")
    assert (first["attempt"], first["previous"], second["attempt"], second["previous"]) == (1, None, 2, first["tx_id"])
    assert [event.tx_id for event in publisher.events] == [second["tx_id"]]
    intact(database_url)


async def test_an_aborted_completion_of_a_run_never_started_is_visible_too(sqlite_url: str) -> None:
    """The run exists from then on, aborted, with its reason."""
    spine = await make(sqlite_url, Local("faulty", raises(Refused("NO", "not today"))))
    async with running(spine):
        for attempt in (1, 2):
            with pytest.raises(TransactionFailed, match="not today"):
                await complete(spine)
            assert len(journal(sqlite_url, "tx.aborted")) == attempt
        why = await spine.why("run-1")
    assert (why.verdict, why.cause.code) == ("rolled_back", "NO")
    assert len(journal(sqlite_url, "run.started")) == 1
    intact(sqlite_url)


async def test_a_failing_completion_takes_nothing_of_its_neighbours_with_it(database_url: str) -> None:
    """Fifty completions at once, every third one broken in its write: exactly the others commit."""

    def plan(run: RunFacts) -> list[Write]:
        if int(run.run_id) % 3 == 0:
            return [*bill(run), Write("UPDATE bills SET cents = 1 WHERE id = 'none'")]
        return bill(run)

    spine = await make(database_url, Local("billing", plan))
    ended: dict[int, str] = {}

    async def one(number: int) -> None:
        try:
            ended[number] = (await complete(spine, str(number))).phase
        except TransactionFailed as error:
            ended[number] = str(error.code)

    async with running(spine):
        await together(*[partial(one, number) for number in range(50)])
    assert {number for number, end in ended.items() if end == "WRITE_GUARD"} == set(range(0, 50, 3))
    assert sorted(int(run_id) for run_id, _ in bills(database_url)) == [n for n in range(50) if n % 3]
    assert rows_written(database_url) == dict.fromkeys(TABLES, 33)
    intact(database_url)


async def test_a_plan_that_is_a_coroutine_is_a_failure_and_not_a_warning(sqlite_url: str) -> None:
    """A LOCAL domain's plan is synchronous: an async one is refused where it is declared, or rolls back cleanly."""

    class Asynchronous:
        name, after = "later", ()

        async def plan(self, run: RunFacts) -> list[Write]:
            return []

    with pytest.raises((ConfigurationError, TransactionFailed), match="later"):
        async with Spine(sqlite_url, domains=[Asynchronous()]) as spine:
            await complete(spine)


# -- again


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
    "other",
    [
        {"status": "failed"},
        {"agent_id": "a8"},
        {"error_code": "E"},
        {"error_message": "text"},
    ],
    ids=repr,
)
async def test_another_payload_under_the_same_key_is_a_conflict(sqlite_url: str, other: dict[str, Any]) -> None:
    """CompletionConflict names run and key and changes nothing; under another key it is another completion."""
    spine = await make(sqlite_url, Local("billing", bill))
    async with running(spine):
        first = await complete(spine)
        before = journal(sqlite_url)
        with pytest.raises(CompletionConflict, match="run-1"):
            await complete(spine, **other)
        *kept, refused = journal(sqlite_url)
        assert kept == before
        assert (refused["kind"], refused["code"]) == ("tx.refused", "COMPLETION_CONFLICT")
        second = await complete(spine, completion_key="correction", **other)
        assert second.is_complete
        assert second.transaction_id != first.transaction_id
        assert (await complete(spine)).transaction_id == first.transaction_id
    assert bills(sqlite_url) == [("run-1", 5)] * 2
    intact(sqlite_url)


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


# -- while it is written


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
