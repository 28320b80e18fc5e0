"""What a completion makes of its run's audit contract, in its own commit: complete, incomplete, or stale made good."""

from __future__ import annotations

import pytest

from spine import Refused, RunFacts, Spine, TransactionFailed, Write
from spine.governance.contract import Overall
from tests.governed import clock, intact, journal, query, running, together, until
from tests.integration.promises import HOUR_US, MAIL, SOON, make, named, overtaken, report, start, table, verdicts
from tests.participants import complete

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("implicit", [False, True])
async def test_a_completion_that_keeps_every_promise_is_complete_in_its_own_commit(
    database_url: str, implicit: bool
) -> None:
    """Whether the run was started before or begins with its completion; nobody has anything to judge later."""
    async with running(spine := Spine(database_url)):
        if not implicit:
            await start(spine)
        await complete(spine)
        assert spine.health().contracts == {"complete": 1, "incomplete": 0, "stale": 0}
        assert (await spine.reconcile("run-1")).overall is Overall.COMPLETE
        assert (await spine.why("run-1")).to_dict()["contract"]["overall"] == "COMPLETE"
    (verdict,), (committed,) = verdicts(database_url), journal(database_url, "tx.committed")
    (started,) = journal(database_url, "run.started")
    assert verdict["unit"] == committed["unit"]
    assert (started["due_at"], verdict["previous"]) == (
        (None, None) if implicit else (started["at"] + HOUR_US, started["seq"])
    )
    assert query(database_url, "SELECT overall, due_at FROM contracts") == [("COMPLETE", None)]
    intact(database_url)


async def test_a_completion_without_what_others_promised_is_incomplete_until_they_report(database_url: str) -> None:
    async with running(spine := Spine(database_url)):
        await start(spine, MAIL)
        await complete(spine)
        (verdict,) = verdicts(database_url)
        assert (verdict["overall"], named(verdict["missing"]), verdict["due_at"]) == (
            "INCOMPLETE", ["mail/send"], None,
        )  # fmt: skip
        await report(spine)
        assert table(database_url) == [("run-1", "COMPLETE")]
        assert spine.health().contracts == {"complete": 1, "incomplete": 1, "stale": 0}
    intact(database_url)


class Moody:
    """Refuses until it is told not to."""

    name = "moody"
    after = ()
    refuses = True

    def plan(self, run: RunFacts) -> list[Write]:
        if self.refuses:
            raise Refused("NOT_NOW", "later")
        return []


@pytest.mark.parametrize("implicit", [False, True])
async def test_an_aborted_completion_is_incomplete_and_the_next_attempt_makes_it_good(
    database_url: str, implicit: bool
) -> None:
    async with running(spine := Spine(database_url, domains=[moody := Moody()])):
        if not implicit:
            await start(spine)
        with pytest.raises(TransactionFailed):
            await complete(spine)
        (verdict,) = verdicts(database_url)
        assert (verdict["overall"], named(verdict["failed"])) == (
            "INCOMPLETE", ["orchestrator/finalize_run", "moody/complete_run"],
        )  # fmt: skip
        (started,) = journal(database_url, "run.started")
        assert verdict["due_at"] == started["at"] + HOUR_US, "it may still turn stale"
        moody.refuses = False
        await complete(spine)
    assert [verdict["overall"] for verdict in verdicts(database_url)] == ["INCOMPLETE", "COMPLETE"]
    intact(database_url)


async def test_a_stale_run_that_is_completed_at_last_is_complete(database_url: str) -> None:
    moments = clock()
    async with running(spine := make(database_url, moments)):
        await start(spine, SOON)
        await until(lambda: table(database_url) == [("run-1", "STALE")], clock=moments)
        await complete(spine)
    assert table(database_url) == [("run-1", "COMPLETE")]
    intact(database_url)


async def test_a_completion_overtaken_by_a_verdict_is_planned_again(database_url: str, unswept: None) -> None:
    """A sweep of another process between its reading and its commit costs a second try, never the completion."""
    async with overtaken(database_url, MAIL) as (here, _):
        await complete(here)
    assert [(verdict["overall"], verdict["due_at"] is None) for verdict in verdicts(database_url)] == [
        ("INCOMPLETE", False),
        ("INCOMPLETE", True),
    ]
    assert len(journal(database_url, "tx.begun")) == len(journal(database_url, "tx.committed")) == 1
    intact(database_url)


async def test_completions_at_once_in_two_spines_are_each_judged_once(database_url: str) -> None:
    here, there = Spine(database_url), Spine(database_url)
    async with running(here, there):
        await together(*(lambda n=n: complete((here, there)[n % 2], f"run-{n // 2}") for n in range(20)))
    assert table(database_url) == [(f"run-{n}", "COMPLETE") for n in range(10)]
    assert len(verdicts(database_url)) == 10
    intact(database_url)


async def test_a_run_may_be_told_to_block_on_its_contract(sqlite_url: str) -> None:
    async with running(spine := Spine(sqlite_url)):
        await start(spine)
        assert (await spine.start_run("strict", tenant_id="acme", block_unmet=True)).allowed
        wrong = await spine.start_run("wrong", tenant_id="acme", block_unmet="yes")  # type: ignore[arg-type]
        assert (wrong.allowed, wrong.code) == (False, "INVALID_PARAMS")
        assert "block_unmet" in wrong.reason
    assert {body["run_id"]: body["block_unmet"] for body in journal(sqlite_url, "run.started")} == {
        "run-1": False,
        "strict": True,
    }
