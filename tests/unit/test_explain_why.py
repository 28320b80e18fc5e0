"""What ``why`` says of every kind of ending, from rows alone."""

from __future__ import annotations

import json

import pytest

from spine.explain import EXIT_EVIDENCE_BROKEN, Explanation, explain, kept, verdict
from tests.unit.explain_rows import Journal


def explained(journal: Journal, *, intact: bool | None = True, now_us: int = 10_000_000) -> Explanation:
    return explain(journal.rows, now_us=now_us, intact=intact)


def test_a_succeeded_run_names_its_commit_as_cause() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1")
    journal.end("d1")
    committed = journal.complete()
    why = explained(journal)
    assert (why.verdict, why.exit_code, why.cause.seq) == ("succeeded", 0, committed.seq)
    assert why.cause.code == "SUCCEEDED"
    assert why.next == "Nothing to do."


def test_the_json_shape_is_the_published_one() -> None:
    journal = Journal()
    journal.start()
    journal.decide(
        "d1",
        rules=[
            {"id": "limit", "version": "3", "mode": "enforce", "outcome": "allow", "determined": True, "reason": "x"}
        ],
        missing_inputs=["amount"],
    )
    journal.end("d1")
    journal.complete()
    journal.add("event", event_id="e1", tx_id="t1", n=0, type="run.completed", payload={})
    found = explained(journal).to_dict()
    assert list(found) == [
        "run_id", "tenant_id", "verdict", "cause", "decisions", "transaction", "contract", "events", "evidence", "next",
    ]  # fmt: skip
    assert set(found["cause"]) == {"code", "text", "seq"}
    assert found["decisions"] == [
        {
            "seq": 2,
            "operation": "refunds.issue",
            "allowed": True,
            "degraded": False,
            "code": "ALLOWED",
            "reason": "ok",
            "rules": [{"id": "limit", "version": "3", "mode": "enforce", "outcome": "allow", "determined": True}],
            "missing_inputs": ["amount"],
            "outcome": {"success": True, "error_code": None, "queue_ms": 1.5, "handle_ms": 2.5},
        }
    ]
    assert found["transaction"] == {
        "state": "COMMITTED",
        "phase": "COMMITTED",
        "domains": [
            {"name": "incidents", "class": "LOCAL", "state": "DONE", "result_id": "i1", "error": None},
            {"name": "ledger", "class": "LOCAL", "state": "DONE", "result_id": None, "error": None},
        ],
    }
    assert found["contract"] is None
    assert found["events"] == [{"event_id": "e1", "type": "run.completed", "published": False}]
    assert found["evidence"] == {"stream": "main", "first": 1, "last": 8, "intact": True}
    json.dumps(found)


def test_a_run_with_only_a_refused_start_is_denied() -> None:
    journal = Journal()
    row = journal.refuse_start()
    why = explained(journal)
    assert (why.verdict, why.exit_code) == ("denied", 3)
    assert why.cause.to_dict() == {
        "code": "DEGRADED_NEW_RUN",
        "text": "run.start was denied: the authority is degraded",
        "seq": row.seq,
    }
    assert [decision.operation for decision in why.decisions] == ["run.start"]
    assert "spine restore" in why.next


def test_a_refused_start_is_forgotten_once_the_run_started() -> None:
    journal = Journal()
    journal.refuse_start()
    journal.start()
    journal.complete("failed", error_code="TASK_NOT_SOLVED", error_message="goal missed")
    why = explained(journal)
    assert (why.verdict, why.cause.code) == ("failed", "TASK_NOT_SOLVED")
    assert why.decisions == []


def test_a_failed_run_with_a_denial_is_denied_and_names_the_rule() -> None:
    journal = Journal()
    journal.start()
    rules = [
        {"id": "other", "version": "1", "mode": "enforce", "outcome": "allow", "determined": False},
        {"id": "small_refunds_only", "version": "2", "mode": "enforce", "outcome": "deny", "determined": True,
         "reason": "over the limit"},
    ]  # fmt: skip
    denial = journal.decide(
        "d1", allowed=False, code="REFUND_LIMIT", reason="refund over 100.00 needs a person", rules=rules
    )
    journal.complete("failed", error_code="TASK_NOT_SOLVED")
    why = explained(journal)
    assert (why.verdict, why.cause.seq, why.cause.code) == ("denied", denial.seq, "REFUND_LIMIT")
    assert why.cause.text == "refunds.issue was denied: refund over 100.00 needs a person"
    assert "small_refunds_only (version 2)" in why.next
    assert "rule small_refunds_only version 2 enforce -> deny: over the limit" in str(why)
    assert "rule other" not in str(why)


def test_what_to_do_after_a_denial_depends_on_where_the_run_stands() -> None:
    rules = [{"id": "limit", "version": "2", "mode": "enforce", "outcome": "deny", "determined": True}]
    journal = Journal()
    journal.start()
    journal.decide("d1", allowed=False, rules=rules)
    assert explained(journal).next.endswith("and repeat the operation.")
    journal.complete("failed")
    assert explained(journal).next.endswith("and run the task again under a new run id.")


def test_a_completion_under_a_degraded_authority_says_so() -> None:
    journal = Journal()
    journal.start()
    journal.complete(authority_degraded=True, authority_reason="provider unstable")
    assert "the completion was flagged: provider unstable" in str(explained(journal))


def test_a_denial_does_not_make_a_succeeded_run_denied() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1", allowed=False)
    journal.complete()
    assert explained(journal).verdict == "succeeded"


def test_of_several_denials_the_one_that_the_run_reported_is_the_cause() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1", allowed=False, code="REFUND_LIMIT", reason="too much")
    journal.decide("d2", "mail.send", allowed=False, code="NO_MAIL", reason="closed")
    journal.complete("failed", error_code="REFUND_LIMIT")
    assert explained(journal).cause.code == "REFUND_LIMIT"
    other = Journal(rows=journal.rows[:3])
    assert explained(other).cause.code == "NO_MAIL"


def test_a_failed_run_cites_what_its_caller_reported() -> None:
    journal = Journal()
    journal.start()
    journal.complete("failed", error_code="TASK_NOT_SOLVED", error_message="goal missed")
    why = explained(journal)
    assert (why.verdict, why.exit_code) == ("failed", 4)
    assert why.cause.to_dict() == {
        "code": "TASK_NOT_SOLVED",
        "text": "the caller reported the run as failed: goal missed",
        "seq": 2,
    }


def test_a_failed_run_without_a_reported_error_cites_its_last_failed_operation() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1")
    end = journal.end(
        "d1", success=False, error_code="HANDLER_EXCEPTION:KeyError", error="'x'", operation="refunds.issue"
    )
    journal.complete("failed")
    why = explained(journal)
    assert (why.cause.code, why.cause.seq) == ("HANDLER_EXCEPTION:KeyError", end.seq)
    assert why.cause.text == "refunds.issue failed: 'x'"
    assert "handler" in why.next


def test_a_failed_run_of_which_nothing_is_known_says_unknown() -> None:
    journal = Journal()
    journal.start()
    journal.complete("failed")
    why = explained(journal)
    assert why.cause.code == "unknown"
    assert "reason unknown" in why.cause.text


def test_a_rolled_back_completion_names_the_domain_and_its_reason() -> None:
    journal = Journal()
    journal.start()
    journal.begin()
    journal.step(1, "ledger", "REFUSED", code="NO_FUNDS", error="empty")
    aborted = journal.abort()
    why = explained(journal)
    assert (why.verdict, why.exit_code) == ("rolled_back", 4)
    assert why.cause.to_dict() == {
        "code": "NO_FUNDS",
        "text": "the completion was rolled back: domain ledger: empty",
        "seq": aborted.seq,
    }
    assert why.transaction is not None
    assert [domain["state"] for domain in why.transaction["domains"]] == ["PLANNED", "REFUSED"]
    assert "ledger" in why.next


def test_an_attempt_that_only_the_end_of_a_process_undid_accuses_no_domain() -> None:
    """The code is no proof: a domain may spell it, and then it is the domain that needs repair."""
    for interrupted in (True, False):
        journal = Journal()
        journal.start()
        journal.begin()
        journal.abort(code="INTERRUPTED", interrupted=interrupted)
        why = explained(journal)
        assert (why.verdict, why.cause.code) == ("rolled_back", "INTERRUPTED")
        assert ("Repair domain ledger" in why.next) is not interrupted
        assert "complete the run again" in why.next.lower()


def test_a_later_attempt_speaks_for_the_run() -> None:
    journal = Journal()
    journal.start()
    journal.begin()
    journal.abort()
    journal.complete(tx_id="t2", attempt=2)
    why = explained(journal)
    assert why.verdict == "succeeded"
    assert "2 attempts" in str(why)


def test_the_attempts_before_are_told_with_what_failed_and_what_was_rolled_back() -> None:
    """One line for each, in the text alone: state, failing domain, error, and every domain that was undone or not."""
    journal = Journal()
    journal.start()
    for tx_id, state, error in (("t1", "ABORTED", "empty"), ("t2", "ABORTED_MANUAL", "ValueError: NO\n")):
        journal.begin(tx_id)
        code = "NO_FUNDS" if error == "empty" else "ValueError"
        journal.abort(tx_id, state="COMPENSATING", code=code, error=error)
        journal.step(0, "pay", "ROLLED_BACK", tx_id)
        journal.step(1, "ledger", "PARKED" if state == "ABORTED_MANUAL" else "ROLLED_BACK", tx_id)
        journal.abort(tx_id, state=state, code=code, error=error)
    journal.complete(tx_id="t3", attempt=3)
    why = explained(journal)
    lines = str(why).splitlines()
    at = lines.index("other attempts (2)")
    assert lines[at + 1] == "  #2 ABORTED; pay, ledger rolled back; because of domain ledger: NO_FUNDS: empty"
    by_hand = "  #7 ABORTED_MANUAL; pay rolled back; ledger could not be rolled back; because of domain ledger"
    assert lines[at + 2] == f"{by_hand}: ValueError: NO\\n"
    assert why.transaction is not None
    assert list(why.transaction) == ["state", "phase", "domains"]


def test_of_many_attempts_before_the_last_ten_are_told() -> None:
    """How many there were is told too."""
    journal = Journal()
    journal.start()
    for n in range(13):
        journal.begin(f"t{n}", completion_key="monthly" if n == 11 else "")
        journal.abort(f"t{n}")
    lines = str(explained(journal)).splitlines()
    at = lines.index("other attempts (12), the last 10 of them")
    assert sum(line.startswith("  #") for line in lines[at:]) == 10
    assert "  #24 ABORTED under key 'monthly'; because of domain ledger: NO_FUNDS: empty" in lines


def test_a_parked_rollback_comes_before_everything() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1", allowed=False)
    journal.begin()
    parked = journal.step(1, "ledger", "PARKED", code="UNREACHABLE", error="no route")
    journal.abort(state="PARKED")
    why = explained(journal)
    assert (why.verdict, why.exit_code, why.cause.code, why.cause.seq) == ("parked", 4, "UNREACHABLE", parked.seq)


def test_a_code_that_its_text_begins_with_is_told_once() -> None:
    """A failure's code is the type of its error, which the error's text names too."""
    journal = Journal()
    journal.start()
    journal.begin()
    journal.abort(state="COMPENSATING", code="ValueError", error="ValueError: card declined")
    journal.step(1, "ledger", "PARKED", code="UNREACHABLE", error="no route")
    journal.abort(state="PARKED")
    assert "ended the completion with ValueError: card declined)" in explained(journal).cause.text


def test_an_open_run_is_pending() -> None:
    journal = Journal()
    journal.start()
    why = explained(journal)
    assert (why.verdict, why.exit_code, why.cause.code) == ("pending", 5, "NOT_COMPLETED")
    journal.decide("d1")
    why = explained(journal)
    assert (why.verdict, why.cause.code) == ("pending", "OPERATION_OPEN")
    assert why.decisions[0].outcome is None
    assert "no outcome recorded" in str(why)
    journal.begin()
    assert explained(journal).cause.code == "EXECUTING"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("COORDINATOR_DISABLED", "Switch the transaction coordinator on (TRANSACTION_COORDINATOR_ENABLED=true)"),
        ("DOMAIN_PARKED", "spine parked"),
        ("ROLLBACK_NOT_SUPPORTED", "Give the domain a rollback"),
        ("INVALID_PARAMS", "Correct what the cause names"),
    ],
)
def test_a_refused_completion_names_what_stands_against_it(code: str, remedy: str) -> None:
    """Completing the run again as it is would be refused again."""
    journal = Journal()
    journal.start()
    journal.add("tx.refused", completion_key="", code=code, reason="it may not begin")
    why = explained(journal)
    assert (why.verdict, why.cause.code) == ("pending", code)
    assert remedy in why.next
    assert "complete the run: complete_run(" in why.next
    journal.begin()
    assert remedy not in explained(journal).next


def test_what_waits_after_the_commit_is_named() -> None:
    """The publisher for its events, each POST domain for its own; who was served is not named."""
    journal = Journal()
    journal.start()
    posts = [
        {"n": n, "name": name, "class": "POST", "effect_id": f"e{n}"} for n, name in enumerate(("letters", "mail"), 2)
    ]
    journal.complete(domains=[{"n": 0, "name": "incidents", "class": "LOCAL"}, *posts])
    for n, kind in enumerate(("run.completed", "post:letters", "post:mail"), 1):
        journal.add("event", event_id=f"e{n}", tx_id="t1", n=n, type=kind, payload={})
    said = "Nothing to do, but 1 of its events waits for the publisher and POST domains letters, mail have yet to act."
    assert explained(journal).next == said
    journal.add("event.published", event_ids=["e1", "e3"])
    assert explained(journal).next == "Nothing to do, but POST domain letters has yet to act."
    journal.add("event.published", event_ids=["e2"])
    assert explained(journal).next == "Nothing to do."


def test_broken_evidence_decides_the_exit_code_and_the_advice() -> None:
    journal = Journal()
    journal.start()
    journal.complete()
    why = explained(journal, intact=False)
    assert (why.verdict, why.exit_code) == ("succeeded", EXIT_EVIDENCE_BROKEN)
    assert "spine verify" in why.next
    assert "BROKEN" in str(why)


def test_the_text_has_verdict_and_cause_in_its_first_two_lines() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1", allowed=False, code="REFUND_LIMIT", reason="too much")
    first, second, *rest = str(explained(journal)).splitlines()
    assert first == "run run-1 denied"
    assert second == "cause: REFUND_LIMIT: refunds.issue was denied: too much (journal #2)"
    assert rest[-1].startswith("next: ")


def test_bypassed_and_failed_open_decisions_say_so() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1", degraded=True, effect="bypassed", would_have={"code": "REFUND_LIMIT", "reason": "too much"})
    journal.end("d1")
    journal.decide("d2", degraded=True, effect="failed_open")
    journal.end("d2")
    text = str(explained(journal))
    assert "allowed, degraded (bypassed)" in text
    assert "would have been denied: REFUND_LIMIT: too much" in text
    assert "(failed open)" in text
    assert explained(journal).verdict == "pending"


@pytest.mark.parametrize(
    "evil", ["a\nverdict: fine", "\x1b[2Jgone", "\u202egnp.exe", "x\r", "\u2028", "\ud800", "\x85", "\u200b"]
)
def test_recorded_text_cannot_forge_lines_or_move_the_cursor(evil: str) -> None:
    journal = Journal(run_id="r" + evil, tenant_id=evil)
    journal.start(agent_id=evil)
    rules = [{"id": evil, "version": evil, "mode": evil, "outcome": evil, "determined": True, "reason": evil}]
    journal.decide("d1", evil, allowed=False, code=evil, reason=evil, rules=rules, missing_inputs=[evil])
    journal.decide("d2", evil)
    journal.end("d2", success=False, error_code=evil, error=evil)
    journal.begin(run_status=evil)
    journal.step(1, evil, evil, error=evil, result_id=evil)
    clean = Journal(run_id="r", tenant_id="t")
    clean.start()
    clean.decide("d1", allowed=False, rules=[{"id": "x", "determined": True}], missing_inputs=["m"])
    clean.decide("d2")
    clean.end("d2", success=False)
    clean.begin()
    clean.step(1, "x", "DONE")
    text = str(explained(journal))
    assert len(text.splitlines()) == len(str(explained(clean)).splitlines())
    assert all(char == "\n" or char.isprintable() for char in text)
    text.encode()


def test_long_reasons_are_cut_in_the_text_and_whole_in_json() -> None:
    journal = Journal()
    journal.start()
    journal.decide("d1", allowed=False, reason="x" * 10_000)
    why = explained(journal)
    assert len(str(why)) < 5_000
    assert why.to_dict()["decisions"][0]["reason"] == "x" * 10_000


def test_no_rows_is_a_lookup_error() -> None:
    with pytest.raises(LookupError, match="no journal row tells of run 'lost'"):
        explain([], now_us=0, run_id="lost")


def test_the_contract_is_reconciled_with_the_acknowledgements() -> None:
    journal = Journal()
    promises = [{"domain": name, "action": "do", "deadline_s": 5} for name in ("met", "failed", "open", "overdue")]
    promises[3]["deadline_s"] = 0
    start = journal.start(expectations=promises)
    journal.add("ack", domain="met", action="do", status="SUCCESS")
    journal.add("ack", domain="failed", action="do", status="FAILED", error="no")
    journal.add("ack", domain="nobody", action="asked", status="SUCCESS")
    found = explained(journal, now_us=start.body["at"] + 1_000_000).contract
    assert found is not None
    statuses = {promise["domain"]: promise["status"] for promise in found["expectations"]}
    assert statuses == {"met": "met", "failed": "failed", "open": "pending", "overdue": "missing", "nobody": "drift"}
    assert found["overall"] == "INCOMPLETE"
    assert found["expectations"][0]["deadline_at"] == start.body["at"] + 5_000_000
    assert "overdue/do missing" in str(explained(journal))


def test_a_kept_contract_is_complete() -> None:
    journal = Journal()
    journal.start(expectations=[{"domain": "ledger", "action": "book", "deadline_s": 60}])
    assert explained(journal, now_us=journal.at).contract["overall"] == "INCOMPLETE"  # type: ignore[index]
    journal.add("ack", domain="ledger", action="book", status="SUCCESS")
    assert explained(journal, now_us=journal.at).contract["overall"] == "COMPLETE"  # type: ignore[index]


def test_what_was_kept_alone_is_the_overall_of_the_explanation() -> None:
    journal = Journal()
    assert kept(journal.rows, now_us=journal.at) is None
    journal.start(expectations=[{"domain": "orchestrator", "action": "finalize_run", "deadline_s": 1}])
    assert kept(journal.rows, now_us=journal.at) == "INCOMPLETE"
    late = journal.at + 2_000_000
    assert kept(journal.rows, now_us=late) == explained(journal, now_us=late).contract["overall"] == "STALE"  # type: ignore[index]


def test_verdict_alone_is_the_verdict_of_the_explanation() -> None:
    journal = Journal()
    journal.start()
    journal.begin()
    journal.abort()
    assert verdict(journal.rows) == explained(journal).verdict == "rolled_back"
    assert verdict([]) == "pending"
