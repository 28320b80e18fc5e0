"""One domain fails: nothing of any domain of the completion is written, and what happened can be seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest

from spine import Refused, RunFacts, Spine, TransactionFailed, Write
from spine.kernel.errors import ConfigurationError
from tests.governed import Published, authority_fields, intact, journal, query, running, together
from tests.integration.billing import TABLES, Local, bill, bills, make, raises, rows_written
from tests.participants import BUILT_IN, complete

pytestmark = pytest.mark.anyio


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
    "changes no row": (
        writes(Write("UPDATE bills SET cents = 1 WHERE id = 'none'")),
        "WRITE_GUARD",
        "changed 0 rows where 1",
    ),
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
    "ends the transaction": (writes(Write("COMMIT")), "WRITE_GUARD", "its write failed (write 1: a commit takes "),
    "says nothing": (writes(Write("")), "WRITE_GUARD", "its write failed (write 1: a commit takes "),
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
