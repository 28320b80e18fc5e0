"""The runtime audit contract: promises, acknowledgements, verdicts."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spine.governance.contract import (
    FINALIZE,
    PENDING,
    STANDARD,
    Ack,
    AckStatus,
    ContractError,
    Due,
    Expectation,
    Overall,
    moment_of,
    promised,
    reconcile,
    unmet,
)

SECOND = 1_000_000
OK, FAILED, BACK = AckStatus.SUCCESS, AckStatus.FAILED, AckStatus.ROLLED_BACK


def due(expectation: Expectation, started_at: int = 0) -> Due:
    """The promise with its moment."""
    moment = moment_of(started_at, expectation.deadline_s)
    return Due(expectation.domain, expectation.action, moment, expectation.after_commit)


DUES = tuple(due(expectation) for expectation in STANDARD)


def told(findings: object) -> list[str]:
    return [f"{finding.domain}/{finding.action}" for finding in findings]  # type: ignore[attr-defined]


def acks(*keys: tuple[str, str], status: AckStatus = OK) -> list[Ack]:
    return [Ack(domain, action, status, result_id="x", tx_id="t") for domain, action in keys]


ALL = acks(*((due.domain, due.action) for due in DUES))


def test_the_standard_set() -> None:
    assert {(e.domain, e.action) for e in STANDARD} == {
        ("incidents", "create_incident"),
        ("policies", "evaluate_policy"),
        ("logs", "start_trace"),
        ("orchestrator", "finalize_run"),
    }
    assert all(e.deadline_s > 0 for e in STANDARD)


def test_all_kept_is_complete() -> None:
    verdict = reconcile(DUES, ALL, now_us=10 * SECOND)
    assert verdict.overall is Overall.COMPLETE
    assert verdict.to_dict() == {
        "overall": "COMPLETE",
        "missing": [],
        "drift": [],
        "failed": [],
        "stale": [],
        "pending": [],
    }


def test_time_left_is_pending_not_missing() -> None:
    verdict = reconcile(DUES, [], now_us=0)
    assert len(verdict.pending) == 4
    assert not verdict.missing
    assert verdict.overall is Overall.INCOMPLETE


def test_a_passed_deadline_is_missing() -> None:
    verdict = reconcile(DUES, [], now_us=61 * SECOND)
    assert told(verdict.missing) == ["logs/start_trace"]


def test_the_deadline_itself_is_in_time() -> None:
    due = [Due("a", "b", 5 * SECOND)]
    assert not reconcile(due, [], now_us=5 * SECOND).missing
    assert reconcile(due, [], now_us=5 * SECOND + 1).missing


def test_a_finalised_run_has_nothing_pending() -> None:
    verdict = reconcile(DUES, [a for a in ALL if a.domain != "policies"], now_us=SECOND)
    assert told(verdict.missing) == ["policies/evaluate_policy"]
    assert not verdict.pending
    assert verdict.overall is Overall.INCOMPLETE


def test_a_run_never_finalised_is_stale() -> None:
    verdict = reconcile(DUES, [a for a in ALL if a.domain != "orchestrator"], now_us=3601 * SECOND)
    assert told(verdict.stale) == ["/".join(FINALIZE)]
    assert verdict.overall is Overall.STALE


def test_an_unpromised_acknowledgement_is_drift_and_told_apart_from_failure() -> None:
    verdict = reconcile(DUES, [*ALL, Ack("billing", "charge", OK)], now_us=0)
    assert told(verdict.drift) == ["billing/charge"]
    assert verdict.overall is Overall.COMPLETE


def test_a_failed_acknowledgement_is_failed_with_its_error() -> None:
    mixed = [a for a in ALL if a.domain != "incidents"]
    verdict = reconcile(DUES, [*mixed, Ack("incidents", "create_incident", FAILED, error="disk")], now_us=0)
    assert [(f.domain, f.error) for f in verdict.failed] == [("incidents", "disk")]
    assert verdict.overall is Overall.INCOMPLETE


def test_a_failure_followed_by_success_is_kept() -> None:
    again = [Ack("incidents", "create_incident", FAILED, tx_id="t0"), *ALL]
    assert reconcile(DUES, again, now_us=0).overall is Overall.COMPLETE


@pytest.mark.parametrize("order", [1, -1])
def test_a_rollback_takes_back_its_own_success_only(order: int) -> None:
    other = Ack("incidents", "create_incident", OK, "x2", tx_id="t2")
    back = Ack("incidents", "create_incident", BACK, "x", tx_id="t")
    assert reconcile(DUES, [*ALL, other, back][::order], now_us=0).overall is Overall.COMPLETE
    verdict = reconcile(DUES, [*ALL, back][::order], now_us=0)
    assert [(f.domain, f.error) for f in verdict.failed] == [("incidents", "rolled back")]


def said(*reports: tuple[AckStatus, str | None, str | None]) -> str:
    """What becomes of mail/send after these reports of status, transaction and result."""
    acks = [
        Ack("mail", "send", status, result, "bounced" if status is FAILED else None, tx)
        for status, tx, result in reports
    ]
    verdict = reconcile([Due("mail", "send", SECOND)], acks, now_us=0)
    (lacking,) = unmet([Due("mail", "send", SECOND)], acks) or [None]
    found = verdict.failed[0] if verdict.failed else None
    assert found == lacking, "one rule for the verdict and for what keeps a run from its commit"
    return "met" if found is None else str(found.error)


def test_the_last_word_counts_where_no_result_is_named() -> None:
    """What was taken back can be delivered again, and what was delivered can still fail."""
    ok, failed, back = (OK, None, None), (FAILED, None, None), (BACK, None, None)
    assert said(ok, back) == "rolled back"
    assert said(ok, back, ok) == "met"
    assert said(ok, failed) == "bounced"
    assert said(ok, ok, failed) == "bounced"
    assert said(failed, ok) == "met"
    assert said(ok, failed, ok) == "met"
    assert said(failed, back, ok, back) == "rolled back"


@pytest.mark.parametrize("tx", [None, "t1"])
def test_a_complaint_takes_back_the_result_it_names_or_all_where_it_names_none(tx: str | None) -> None:
    one, other = (OK, tx, "m1"), (OK, tx, "m2")
    assert said(one, (FAILED, tx, "m1")) == "bounced"
    assert said(one, other, (FAILED, tx, "m1")) == "met"
    assert said(one, other, (FAILED, tx, "m1"), (BACK, tx, "m2")) == "rolled back"
    assert said(one, other, (FAILED, tx, None)) == "bounced"
    assert said(one, (FAILED, tx, "m1"), one) == "met"


def test_another_transactions_complaint_takes_nothing_back() -> None:
    """Neither that of an earlier attempt, nor of a completion under another key, which left nothing behind."""
    for status, result in ((FAILED, None), (BACK, "m1"), (FAILED, "m1")):
        other, kept = (status, "t1", result), (OK, "t2", "m1")
        assert said(other, kept) == said(kept, other) == "met"


def test_a_result_that_was_rolled_back_by_its_id_stays_so() -> None:
    """A report that arrives late does not bring it back; one of a new result does."""
    gone = ((OK, None, "m1"), (BACK, None, "m1"), (OK, None, "m1"))
    assert said(*gone) == "rolled back"
    assert said(*gone, (OK, None, "m2")) == "met"


def test_no_promises_no_verdict_to_give() -> None:
    assert reconcile([], [], now_us=0).overall is Overall.COMPLETE


def test_what_is_promised_for_after_the_commit_still_has_time_when_the_run_is_finalised() -> None:
    """It is pending until its own deadline, and missing only then."""
    dues = [due(Expectation(*FINALIZE)), due(Expectation("mail", "send", 10, after_commit=True))]
    finalised = [Ack(*FINALIZE, AckStatus.SUCCESS)]
    early, late = reconcile(dues, finalised, now_us=5_000_000), reconcile(dues, finalised, now_us=10_000_001)
    assert ([f.domain for f in early.pending], early.standing, early.due_at) == (["mail"], "PENDING", 10_000_000)
    assert ([f.domain for f in late.missing], late.standing, late.due_at) == (["mail"], "INCOMPLETE", None)
    met = reconcile(dues, [*finalised, Ack("mail", "send", AckStatus.SUCCESS)], now_us=5_000_000)
    assert (met.standing, met.due_at) == ("COMPLETE", None)


def test_a_run_promises_the_standard_set_its_domains_and_the_users_own() -> None:
    found = promised(
        [Expectation("incidents", "create_incident"), Expectation("billing", "charge")],
        [Expectation("incidents", "create_incident", 5), Expectation("mail", "sent", 9)],
    )
    assert {(e.domain, e.action): e.deadline_s for e in found} == {
        ("logs", "start_trace"): 60,
        ("incidents", "create_incident"): 5,
        ("policies", "evaluate_policy"): 3600,
        ("orchestrator", "finalize_run"): 3600,
        ("billing", "charge"): 3600,
        ("mail", "sent"): 9,
    }


def test_a_deadline_is_counted_from_the_start() -> None:
    assert due(Expectation("a", "b", 1.5), 10 * SECOND) == Due("a", "b", 11_500_000)


def test_what_only_waits_stands_pending_and_what_is_found_has_its_verdict() -> None:
    assert reconcile(DUES, [], now_us=0).standing == PENDING
    assert reconcile(DUES, ALL, now_us=0).standing == "COMPLETE"
    assert reconcile(DUES, [], now_us=61 * SECOND).standing == "INCOMPLETE"
    assert reconcile(DUES, acks(("incidents", "create_incident"), status=FAILED), now_us=0).standing == "INCOMPLETE"
    assert reconcile(DUES, [], now_us=3601 * SECOND).standing == "STALE"


def test_the_next_due_moment_is_the_earliest_deadline_not_yet_judged() -> None:
    assert reconcile(DUES, [], now_us=0).due_at == 60 * SECOND
    assert reconcile(DUES, [], now_us=60 * SECOND).due_at == 60 * SECOND
    assert reconcile(DUES, [], now_us=60 * SECOND + 1).due_at == 3600 * SECOND
    assert reconcile(DUES, acks(("logs", "start_trace")), now_us=0).due_at == 3600 * SECOND
    assert reconcile(DUES, [], now_us=3600 * SECOND + 1).due_at is None


def test_what_was_reported_is_not_due_any_more_but_a_failed_finalisation_is() -> None:
    dues = [Due("a", "b", 5), Due(*FINALIZE, 9)]
    assert reconcile(dues, acks(("a", "b"), status=FAILED), now_us=0).due_at == 9
    assert reconcile(dues, acks(("a", "b"), FINALIZE, status=FAILED), now_us=0).due_at == 9
    assert reconcile(dues, acks(FINALIZE), now_us=0).due_at is None


KEYS = st.sampled_from([("a", "x"), ("b", "x"), FINALIZE])
PROMISES = st.dictionaries(KEYS, st.integers(0, 20)).map(lambda found: [Due(*key, at) for key, at in found.items()])
REPORTS = st.lists(st.builds(lambda key, status: Ack(*key, status), KEYS, st.sampled_from(AckStatus)))


@given(dues=PROMISES, reports=REPORTS, now=st.integers(0, 25))
def test_the_verdict_holds_until_the_next_due_moment_and_not_beyond(
    dues: list[Due], reports: list[Ack], now: int
) -> None:
    """So a sweep that looks at nothing before its moment misses nothing, and never comes for nothing."""
    verdict = reconcile(dues, reports, now)
    moment = verdict.due_at
    for later in range(now, 25 if moment is None else moment + 1):
        assert reconcile(dues, reports, later) == verdict
    if moment is not None:
        assert reconcile(dues, reports, moment + 1) != verdict


def test_unmet_is_what_is_promised_and_not_delivered_but_by_the_completion_itself() -> None:
    part = [("incidents", "create_incident"), ("policies", "evaluate_policy")]
    dues = [*DUES, Due("billing", "charge", 5), Due("mail", "send", 5), Due("ledger", "book", 5)]
    reports = [
        *acks(("logs", "start_trace"), ("ledger", "book")),
        Ack("mail", "send", FAILED, error="no such address"),
        Ack("nobody", "asked", OK),
    ]
    found = unmet(dues, reports, part)
    assert [str(finding) for finding in found] == ["billing/charge missing", "mail/send failed: no such address"]
    taken_back = [*reports, Ack("ledger", "book", BACK, "x", tx_id="t")]
    assert told(unmet(dues, taken_back, part)) == ["billing/charge", "mail/send", "ledger/book"]
    assert told(unmet(DUES, [], part)) == ["logs/start_trace"]
    assert unmet(DUES, ALL) == ()


def test_a_refused_report_keeps_its_code_across_processes() -> None:
    error = pickle.loads(pickle.dumps(ContractError("UNKNOWN_RUN", "run 'x' was never started")))
    assert (error.code, str(error)) == ("UNKNOWN_RUN", "UNKNOWN_RUN: run 'x' was never started")
