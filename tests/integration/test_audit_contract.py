"""The runtime audit contract of a running Spine: promises judged on demand, by domains' reports and by the sweep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from actors import reconciler
from spine import ContractError, Refused, RunFacts, Settings, Spine, TransactionFailed, Write
from spine.governance.contract import FINALIZE, Overall
from spine.governance.units import StorageFailed
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import ActorCrashed, JournalUnavailable
from tests.governed import intact, journal, query, running, together, until
from tests.laws.world import kill

pytestmark = pytest.mark.anyio

MAIL = ("mail", "send", 5.0)
SOON = (*FINALIZE, 5.0)
HOUR_US = 3_600_000_000


def clock(later_s: float = 0) -> VirtualClock:
    return VirtualClock(time.time_ns() // 1000 + round(later_s * 1e6))


def make(url: str, moments: VirtualClock, **more: Any) -> Spine:
    return Spine(url, settings=Settings(clock=moments), **more)


async def start(spine: Spine, *expectations: tuple[str, str, float], run_id: str = "run-1") -> None:
    assert (await spine.start_run(run_id, tenant_id="acme", expectations=expectations)).allowed


async def report(spine: Spine, status: str = "SUCCESS", *, run_id: str = "run-1", **more: Any) -> None:
    facts = {"tenant_id": "acme", "domain": "mail", "action": "send", "status": status} | more
    await spine.acknowledge(run_id, **facts)


def table(url: str) -> list[tuple[Any, ...]]:
    return query(url, "SELECT run_id, overall FROM contracts ORDER BY run_id")


def verdicts(url: str) -> list[dict[str, Any]]:
    return journal(url, "contract.reconciled")


def named(findings: list[dict[str, Any]]) -> list[str]:
    return [f"{finding['domain']}/{finding['action']}" for finding in findings]


@pytest.fixture
def unswept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sweeps in this test."""
    monkeypatch.setattr(reconciler, "SWEEP_S", 1e9)


# -- the sweep


async def test_a_promise_whose_time_is_over_is_missing_once_it_is_swept(database_url: str) -> None:
    """Seen in the journal, its table, ``why`` and health; the next moment to look is the next deadline."""
    moments = clock()
    spine = make(database_url, moments)
    async with running(spine):
        await start(spine, MAIL)
        assert table(database_url) == [("run-1", "PENDING")]
        await until(lambda: verdicts(database_url), clock=moments)
        (verdict,) = verdicts(database_url)
        (started,) = journal(database_url, "run.started")
        assert (verdict["overall"], verdict["was"], verdict["previous"]) == ("INCOMPLETE", "PENDING", started["seq"])
        assert named(verdict["missing"]) == ["mail/send"]
        assert not (verdict["failed"] or verdict["stale"] or verdict["drift"])
        assert started["at"] + 5_000_000 < verdict["at"] <= started["at"] + 7_000_000
        assert verdict["due_at"] == started["at"] + HOUR_US
        why = (await spine.why("run-1")).to_dict()["contract"]
        assert {entry["domain"]: entry["status"] for entry in why["expectations"]}["mail"] == "missing"
        await until(lambda: spine.health().contracts == {"complete": 0, "incomplete": 1, "stale": 0})
        await moments.advance(3)
    assert table(database_url) == [("run-1", "INCOMPLETE")]
    assert len(verdicts(database_url)) == 1, "what is judged is left alone until its next moment"
    intact(database_url)


async def test_a_promise_kept_in_time_is_never_found(database_url: str) -> None:
    moments = clock()
    spine = make(database_url, moments)
    async with running(spine):
        await start(spine, MAIL)
        await report(spine)
        await moments.advance(8)
        assert (await spine.reconcile("run-1")).missing == ()
    assert table(database_url) == [("run-1", "PENDING")]
    intact(database_url)


async def test_a_run_not_finalised_in_time_is_stale(database_url: str) -> None:
    moments = clock()
    spine = make(database_url, moments)
    async with running(spine):
        await start(spine, SOON)
        await until(lambda: table(database_url) == [("run-1", "STALE")], clock=moments)
        assert named(verdicts(database_url)[-1]["stale"]) == ["orchestrator/finalize_run"]
        await until(lambda: spine.health().contracts["stale"] == 1)
        assert (await spine.why("run-1")).to_dict()["contract"]["overall"] == "STALE"
    intact(database_url)


async def test_what_fell_due_while_everything_was_down_is_found_after_the_start(database_url: str) -> None:
    async with running(spine := make(database_url, clock())):
        for n in range(3):
            await start(spine, SOON, run_id=f"run-{n}")
    later = clock(later_s=60)
    async with running(make(database_url, later)):
        await until(lambda: len(verdicts(database_url)) == 3, clock=later)
    assert table(database_url) == [(f"run-{n}", "STALE") for n in range(3)]
    intact(database_url)


async def test_two_spines_that_sweep_one_database_record_each_verdict_once(database_url: str) -> None:
    moments = clock(), clock()
    spines = [make(database_url, each) for each in moments]
    async with running(*spines):
        for n in range(12):
            await start(spines[n % 2], SOON, run_id=f"run-{n}")
        await together(*(lambda each=each: each.advance(7) for each in moments))
        await until(lambda: all(overall == "STALE" for _, overall in table(database_url)), clock=moments[0])
        await together(*(lambda each=each: each.advance(2) for each in moments))
        assert sum(spine.health().contracts["stale"] for spine in spines) == 12
    assert sorted(verdict["run_id"] for verdict in verdicts(database_url)) == sorted(f"run-{n}" for n in range(12))
    intact(database_url)


async def test_a_sweep_that_was_overtaken_between_reading_and_writing_changes_nothing(
    database_url: str, unswept: None
) -> None:
    """The compare-and-set on the row it read: the other verdict stands, and is counted by who made it alone."""
    moments = clock()
    slow, fast = make(database_url, moments), make(database_url, moments)
    async with running(slow, fast):
        await start(slow, SOON)
        await moments.advance(6)
        overtake(slow, lambda: fast.reconcile("run-1"))
        assert (await slow.reconcile("run-1")).overall is Overall.STALE
        assert [spine.health().contracts["stale"] for spine in (slow, fast)] == [0, 1]
    assert len(verdicts(database_url)) == 1
    intact(database_url)


def overtake(spine: Spine, work: Callable[[], Awaitable[Any]]) -> None:
    """Let ``work`` happen after this Spine has read a contract the next time, before it writes."""
    reader: Any = spine._system.reader
    read = reader.contract_rows

    async def slowly(run_id: str) -> Any:
        reader.contract_rows = read
        rows = await read(run_id)
        await work()
        return rows

    reader.contract_rows = slowly


async def test_a_sweep_goes_through_every_page_and_past_what_it_cannot_read(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose journal rows are gone is named in the log, and keeps no other from its verdict."""
    monkeypatch.setattr(reconciler, "PAGE", 1)
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        for n in range(5):
            await start(spine, SOON, run_id=f"run-{n}")
        query(sqlite_url, "DELETE FROM journal WHERE run_id = 'run-0'")
        await until(lambda: len(verdicts(sqlite_url)) == 4, clock=moments)
    assert table(sqlite_url) == [(f"run-{n}", "PENDING" if n == 0 else "STALE") for n in range(5)]
    assert "spine.contract.unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("error", [JournalUnavailable("the database is away"), RuntimeError("a bug")])
async def test_a_sweep_that_fails_is_reported_and_the_next_one_comes(
    sqlite_url: str, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        await start(spine, SOON)
        reader: Any = spine._system.reader
        find, failures = reader.due_contracts, []

        async def fails(*args: Any, **more: Any) -> Any:
            if len(failures) < 2:
                failures.append(error)
                raise error
            return await find(*args, **more)

        reader.due_contracts = fails
        await until(lambda: table(sqlite_url) == [("run-1", "STALE")], clock=moments)
    assert len(failures) == 2
    assert str(error) in capsys.readouterr().out


async def test_the_sweep_goes_on_after_a_crash_of_the_audit_actor(sqlite_url: str) -> None:
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        await start(spine, SOON)
        await kill(spine, "audit")
        await until(lambda: table(sqlite_url) == [("run-1", "STALE")], clock=moments)
    intact(sqlite_url)


async def test_a_question_that_the_audit_actor_crashes_on_is_told(sqlite_url: str) -> None:
    """It is not left without an answer, and asking again gives one."""
    async with running(spine := Spine(sqlite_url)):
        await start(spine)
        reader: Any = spine._system.reader
        read, asked = reader.contract_rows, anyio.Event()

        async def hangs(run_id: str) -> Any:
            reader.contract_rows = read
            asked.set()
            await anyio.sleep_forever()

        reader.contract_rows = hangs
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                with pytest.raises(ActorCrashed, match="audit"):
                    await spine.reconcile("run-1")

            group.start_soon(ask)
            await asked.wait()
            await kill(spine, "audit")
        assert (await spine.reconcile("run-1")).overall is Overall.INCOMPLETE


async def test_a_stop_does_not_wait_for_a_sweep_that_hangs(sqlite_url: str) -> None:
    moments = clock()
    spine = make(sqlite_url, moments)
    await spine.start()
    hanging = anyio.Event()

    async def hangs(*_: Any, **__: Any) -> Any:
        hanging.set()
        await anyio.sleep_forever()

    reader: Any = spine._system.reader
    reader.due_contracts = hangs
    await moments.advance(1)
    await hanging.wait()
    began = time.monotonic()
    receipts = await spine.stop()
    assert {receipt.child: receipt.end for receipt in receipts}["audit"] == "clean"
    assert time.monotonic() - began < 3
    assert [task for task in asyncio.all_tasks() if "contract" in task.get_name()] == []


# -- on demand


async def test_on_demand_a_run_is_judged_as_of_now(database_url: str, unswept: None) -> None:
    """What changed nothing leaves no record; what did is recorded once."""
    moments = clock()
    async with running(spine := make(database_url, moments)):
        await start(spine, MAIL)
        for _ in range(2):
            found = await spine.reconcile("run-1")
            assert (found.overall, found.standing) == (Overall.INCOMPLETE, "PENDING")
            assert "mail" in {finding.domain for finding in found.pending}
        assert verdicts(database_url) == []
        await moments.advance(6)
        for _ in range(2):
            found = await spine.reconcile("run-1")
            assert [str(finding) for finding in found.missing] == ["mail/send missing"]
        assert [verdict["overall"] for verdict in verdicts(database_url)] == ["INCOMPLETE"]
    intact(database_url)


async def test_a_run_that_does_not_exist_has_no_contract(database_url: str) -> None:
    async with running(spine := Spine(database_url)):
        with pytest.raises(ContractError, match="'lost' was never started") as told:
            await spine.reconcile("lost")
        assert told.value.code == "UNKNOWN_RUN"
        for hostile in ("", "a\x00b", "x" * 10_000, "\ud800", None, 5):
            with pytest.raises(ContractError, match="run_id") as told:
                await spine.reconcile(hostile)  # type: ignore[arg-type]
            assert told.value.code == "INVALID_PARAMS"


async def test_a_verdict_that_cannot_be_recorded_is_an_error(sqlite_url: str, unswept: None) -> None:
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        await start(spine, MAIL)
        await moments.advance(6)
        refuse(spine)
        with pytest.raises(JournalUnavailable, match=r"run 'run-1'.*no space"):
            await spine.reconcile("run-1")
        with pytest.raises(JournalUnavailable, match=r"'mail' reports.*'run-1'.*no space"):
            await report(spine)


def refuse(spine: Spine) -> None:
    """Let the journal take no more records."""
    writer: Any = spine._system.writer

    async def full(units: Any) -> list[StorageFailed]:
        return [StorageFailed("no space left") for _ in units]

    writer.commit = full


# -- what domains report


async def test_a_report_is_recorded_with_the_verdict_it_brings_about(database_url: str) -> None:
    """Failed, taken back, delivered again: each time in the commit of the report itself."""
    async with running(spine := Spine(database_url)):
        await start(spine, MAIL)
        await report(spine, "FAILED", error="no such address")
        assert table(database_url) == [("run-1", "INCOMPLETE")]
        assert [str(finding) for finding in (await spine.reconcile("run-1")).failed] == [
            "mail/send failed: no such address"
        ]
        await report(spine, result_id="m1")
        assert table(database_url) == [("run-1", "PENDING")]
        await report(spine, "ROLLED_BACK", result_id="m1", error="recalled")
        assert table(database_url) == [("run-1", "INCOMPLETE")]
        assert named(verdicts(database_url)[-1]["failed"]) == ["mail/send"]
        await report(spine, result_id="m2")
        assert table(database_url) == [("run-1", "PENDING")]
    units = {body["unit"]: body["seq"] for body in journal(database_url, "ack")}
    assert all(units[verdict["unit"]] == verdict["seq"] - 1 for verdict in verdicts(database_url))
    acks = [body for body in journal(database_url, "ack") if body["domain"] == "mail"]
    assert [(body["status"], body["result_id"], body["error"], body["tx_id"]) for body in acks] == [
        ("FAILED", None, "no such address", None),
        ("SUCCESS", "m1", None, None),
        ("ROLLED_BACK", "m1", "recalled", None),
        ("SUCCESS", "m2", None, None),
    ]
    intact(database_url)


async def test_a_report_nobody_promised_is_drift(database_url: str) -> None:
    async with running(spine := Spine(database_url)):
        await start(spine)
        await report(spine)
        assert verdicts(database_url) == [], "drift alone makes no other verdict"
        found = await spine.reconcile("run-1")
        assert [str(finding) for finding in found.drift] == ["mail/send drift"]
    intact(database_url)


async def test_a_late_report_makes_good_what_was_missing(database_url: str) -> None:
    moments = clock()
    async with running(spine := make(database_url, moments)):
        await start(spine, MAIL)
        await until(lambda: table(database_url) == [("run-1", "INCOMPLETE")], clock=moments)
        await report(spine)
        assert table(database_url) == [("run-1", "PENDING")]
    intact(database_url)


async def test_a_report_that_was_overtaken_by_a_verdict_is_judged_again_with_it(
    database_url: str, unswept: None
) -> None:
    moments = clock()
    here, there = make(database_url, moments), make(database_url, moments)
    async with running(here, there):
        await start(here, MAIL)
        await moments.advance(6)
        overtake(here, lambda: there.reconcile("run-1"))
        await report(here)
    assert [verdict["overall"] for verdict in verdicts(database_url)] == ["INCOMPLETE", "PENDING"]
    assert len([body for body in journal(database_url, "ack") if body["domain"] == "mail"]) == 1
    intact(database_url)


async def test_reports_of_one_run_at_once_all_count(database_url: str) -> None:
    """They contend for the run's one verdict, from two processes' Spines; none is lost."""
    here, there = Spine(database_url), Spine(database_url)
    names = [f"d{n}" for n in range(10)]
    async with running(here, there):
        await start(here, *((name, "send", 5.0 + n) for n, name in enumerate(names)))
        await together(
            *(lambda n=n, name=name: report((here, there)[n % 2], domain=name) for n, name in enumerate(names))
        )
        found = await here.reconcile("run-1")
        assert not {finding.domain for finding in found.pending} & set(names)
    (started,) = journal(database_url, "run.started")
    assert query(database_url, "SELECT due_at FROM contracts") == [(started["at"] + HOUR_US,)]
    intact(database_url)


async def test_a_report_is_taken_whatever_the_governance_state(sqlite_url: str) -> None:
    async with running(spine := Spine(sqlite_url)):
        await start(spine, MAIL)
        await spine.halt(reason="an exercise", actor="ann")
        await report(spine)
        assert (await spine.reconcile("run-1")).failed == ()
    assert len(journal(sqlite_url, "ack")) == 2


HOSTILE = [
    ({"run_id": ""}, "run_id"),
    ({"run_id": None}, "run_id"),
    ({"run_id": "a\x00b"}, "run_id"),
    ({"tenant_id": ""}, "tenant_id"),
    ({"tenant_id": 5}, "tenant_id"),
    ({"domain": " "}, "domain"),
    ({"domain": None}, "domain"),
    ({"domain": "x" * 10_000}, "domain"),
    ({"domain": "\ud800"}, "domain"),
    ({"action": ""}, "action"),
    ({"action": b"send"}, "action"),
    ({"action": "a\nb"}, "action"),
    ({"status": "success"}, "status"),
    ({"status": ""}, "status"),
    ({"status": None}, "status"),
    ({"status": "x" * 100_000}, "status"),
    ({"status": ["SUCCESS"]}, "status"),
    ({"result_id": ""}, "result_id"),
    ({"result_id": 7}, "result_id"),
    ({"result_id": "a\x00b"}, "result_id"),
    ({"error": ValueError("no")}, "error"),
    ({"domain": FINALIZE[0], "action": FINALIZE[1]}, "acknowledged by the completion itself"),
]


@pytest.mark.parametrize(("wrong", "names"), HOSTILE)
async def test_a_report_that_cannot_be_recorded_is_refused_by_name(
    sqlite_url: str, wrong: dict[str, Any], names: str
) -> None:
    async with running(spine := Spine(sqlite_url)):
        await start(spine, MAIL)
        with pytest.raises(ContractError, match=names) as told:
            await report(spine, **wrong)
        assert told.value.code == "INVALID_PARAMS"
        assert len(str(told.value)) < 1_000
        assert spine.health().restarts == 0
    assert [body["domain"] for body in journal(sqlite_url, "ack")] == ["logs"]
    intact(sqlite_url)


async def test_a_report_about_anothers_run_or_none_is_refused(database_url: str) -> None:
    async with running(spine := Spine(database_url)):
        await start(spine, MAIL)
        for wrong, code in (({"tenant_id": "other"}, "TENANT_MISMATCH"), ({"run_id": "lost"}, "UNKNOWN_RUN")):
            with pytest.raises(ContractError) as told:
                await report(spine, **wrong)
            assert told.value.code == code
        assert (await spine.start_run("lost", tenant_id="other")).allowed, "the refusal starts nothing"
    assert [body["domain"] for body in journal(database_url, "ack")] == ["logs", "logs"]


async def test_a_long_or_odd_error_text_is_kept_bounded(database_url: str) -> None:
    async with running(spine := Spine(database_url)):
        await start(spine, MAIL)
        await report(spine, "FAILED", error="no\x00 \ud800" + "x" * 100_000)
        (finding,) = (await spine.reconcile("run-1")).failed
    assert finding.error is not None and len(finding.error) < 5_000
    intact(database_url)


# -- the completion


async def complete(spine: Spine, run_id: str = "run-1") -> None:
    await spine.complete_run(run_id, tenant_id="acme", run_status="succeeded")


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
    moments = clock()
    here, there = make(database_url, moments), make(database_url, moments)
    async with running(here, there):
        await start(here, MAIL)
        await moments.advance(6)
        overtake(here, lambda: there.reconcile("run-1"))
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


# -- how it begins


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
