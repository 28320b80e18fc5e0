"""What domains report to a run's audit contract: recorded with the verdict it brings about, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from spine import ContractError, Spine, TransactionFailed
from spine.built_in import BUILT_INS
from spine.governance.contract import FINALIZE
from tests.governed import clock, intact, journal, query, running, together, until
from tests.integration.billing import Local
from tests.integration.promises import HOUR_US, MAIL, make, named, overtaken, report, start, table, verdicts
from tests.participants import Remote, Sender, World, complete

pytestmark = pytest.mark.anyio


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


async def test_the_last_report_counts_also_for_a_run_that_is_bound_to_its_contract(database_url: str) -> None:
    """Taken back and delivered again it may commit; what fails after that makes it incomplete."""
    async with running(spine := Spine(database_url)):
        await spine.start_run("run-1", tenant_id="acme", expectations=[MAIL], block_unmet=True)
        await report(spine)
        await report(spine, "ROLLED_BACK")
        with pytest.raises(TransactionFailed, match="mail/send failed: rolled back"):
            await complete(spine)
        await report(spine)
        await complete(spine)
        assert table(database_url) == [("run-1", "COMPLETE")]
        await report(spine, "FAILED", error="bounced")
        assert table(database_url) == [("run-1", "INCOMPLETE")]
        assert [str(finding) for finding in (await spine.reconcile("run-1")).failed] == ["mail/send failed: bounced"]
        contract = (await spine.why("run-1")).to_dict()["contract"]
        assert {entry["domain"]: entry["status"] for entry in contract["expectations"]}["mail"] == "failed"
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
    async with overtaken(database_url, MAIL) as (here, _):
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
    *(
        ({"domain": domain, "action": action}, f"{domain}/{action} is acknowledged by the completion itself")
        for domain, action in (FINALIZE, *((part.name, part.action) for part in BUILT_INS))
    ),
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


async def test_what_takes_part_in_completions_is_not_reported_by_hand(database_url: str, world: World) -> None:
    """Nobody's word makes a promise kept that only the completion keeps; of anything else a domain may report."""
    billing = Local("billing", lambda run: [], action="charge")
    spine = Spine(database_url, domains=[billing, Remote(world), Sender(world, "letters")])
    async with running(spine):
        await start(spine, MAIL)
        for domain, action in (("billing", "charge"), ("pay", "complete_run"), ("letters", "complete_run")):
            for status in ("SUCCESS", "FAILED", "ROLLED_BACK"):
                with pytest.raises(ContractError, match=f"^INVALID_PARAMS: {domain}/{action} is acknowledged by"):
                    await report(spine, status, domain=domain, action=action)
        await report(spine, domain="billing", action="remind")
        await report(spine)
        found = await spine.reconcile("run-1")
        assert {"billing", "pay", "letters"} <= {finding.domain for finding in found.pending}
        assert [str(finding) for finding in found.drift] == ["billing/remind drift"]
        await complete(spine)
        await until(lambda: table(database_url) == [("run-1", "COMPLETE")])
    intact(database_url)


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
