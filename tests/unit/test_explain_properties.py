"""Law 11: whatever was recorded, ``why`` invents nothing and gives exactly one cause."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from spine.explain import EXIT_CODES, explain, totals, verdict
from tests.unit.explain_rows import Journal

codes = st.sampled_from([None, "REFUND_LIMIT", "HANDLER_EXCEPTION:KeyError", "TIMEOUT", "DENIED"])
texts = st.none() | st.text(max_size=8)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("allow"), st.booleans(), st.none() | st.booleans(), codes, texts),
        st.tuples(st.just("deny"), codes, texts),
        st.tuples(
            st.just("begin"),
            st.sampled_from(["succeeded", "failed", "cancelled"]),
            st.sampled_from(["", "k"]),
            codes,
            texts,
        ),
        st.tuples(
            st.just("end"), st.sampled_from(["COMMITTED", "ABORTED", "PARKED", "COMPENSATING", "ABORTED_MANUAL"])
        ),
        st.tuples(
            st.just("step"), st.sampled_from(["DONE", "REFUSED", "PARKED", "ROLLED_BACK", "UNKNOWN"]), codes, texts
        ),
    ),
    max_size=12,
)


def journal_of(started: bool, moves: list[tuple[Any, ...]]) -> Journal:
    journal = Journal()
    if started:
        journal.start()
    else:
        journal.refuse_start()
    tx = 0
    for number, move in enumerate(moves):
        match move:
            case ("allow", degraded, success, code, text):
                journal.decide(f"e{number}", degraded=degraded)
                if success is not None:
                    journal.end(f"e{number}", success=success, error_code=code, error=text)
            case ("deny", code, text):
                journal.decide(f"e{number}", allowed=False, code=code, reason=text)
            case ("begin", status, key, code, text):
                tx += 1
                journal.begin(f"t{tx}", status, completion_key=key, error_code=code, error_message=text)
            case ("end", "COMMITTED") if tx:
                journal.commit(f"t{tx}", journal_status(journal, f"t{tx}"))
            case ("end", state) if tx and state != "COMMITTED":
                journal.abort(f"t{tx}", state=state)
            case ("step", state, code, text) if tx:
                journal.step(1, "ledger", state, f"t{tx}", code=code, error=text)
            case _:
                pass
    return journal


def journal_status(journal: Journal, tx_id: str) -> str:
    return next(
        row.body["run_status"] for row in journal.rows if row.body.get("tx_id") == tx_id and "attempt" in row.body
    )


@settings(max_examples=300, deadline=None)
@given(st.booleans(), actions)
def test_every_run_has_exactly_one_cause_that_cites_one_of_its_rows(
    started: bool, moves: list[tuple[Any, ...]]
) -> None:
    journal = journal_of(started, moves)
    why = explain(journal.rows, now_us=journal.at, intact=True)
    seqs = {row.seq for row in journal.rows}
    assert why.verdict in EXIT_CODES
    assert why.verdict == verdict(journal.rows)
    assert why.cause.code
    assert why.cause.text
    assert why.cause.seq in seqs
    assert why.next.endswith(".")
    text = str(why).splitlines()
    assert text[1].startswith("cause: ")
    assert sum(line.startswith("cause: ") for line in text) == 1
    json.dumps(why.to_dict())


@settings(max_examples=200, deadline=None)
@given(st.booleans(), actions)
def test_nothing_is_shown_that_no_row_records(started: bool, moves: list[tuple[Any, ...]]) -> None:
    journal = journal_of(started, moves)
    why = explain(journal.rows, now_us=journal.at)
    bodies = {row.seq: row.body for row in journal.rows}
    for decision in why.decisions:
        body = bodies[decision.seq]
        assert (decision.operation, decision.allowed, decision.code, decision.reason) == (
            body["operation"], body["allowed"], body["code"], body["reason"],
        )  # fmt: skip
        ends = [b for b in bodies.values() if b["kind"] == "outcome" and b["decision_id"] == body["decision_id"]]
        shown = decision.outcome
        assert [(b["success"], b["error_code"]) for b in ends] == (
            [] if shown is None else [(shown["success"], shown["error_code"])]
        )
    recorded = json.dumps([row.body for row in journal.rows])
    words = {
        "unknown", "SUCCEEDED", "PARKED", "DENIED", "OPERATION_OPEN", "NOT_COMPLETED", "EXECUTING", "COMPENSATING",
        "RESOLVED",
    }  # fmt: skip
    assert why.cause.code in words or json.dumps(why.cause.code)[1:-1] in recorded


@settings(max_examples=200, deadline=None)
@given(st.booleans(), actions)
def test_the_verdict_is_the_first_that_applies(started: bool, moves: list[tuple[Any, ...]]) -> None:
    journal = journal_of(started, moves)
    found = verdict(journal.rows)
    kinds = [row.body["kind"] for row in journal.rows]
    denied = any(row.body.get("allowed") is False for row in journal.rows)
    if found == "denied":
        assert denied
    if found in ("succeeded", "failed"):
        assert "tx.committed" in kinds
    if found == "failed":
        assert not denied
    if found == "rolled_back":
        assert "tx.aborted" in kinds or "tx.resolved" in kinds
    if "tx.begun" not in kinds:
        assert found == ("denied" if denied else "pending")


@settings(max_examples=100, deadline=None)
@given(st.booleans(), actions)
def test_totals_add_up(started: bool, moves: list[tuple[Any, ...]]) -> None:
    counted = totals(journal_of(started, moves).rows)
    assert counted.runs == 1
    assert counted.operations == counted.allowed + counted.denied
    assert counted.degraded <= counted.allowed
    assert counted.failed_operations <= counted.allowed
    twice = totals([])
    twice.add(counted)
    twice.add(counted)
    assert twice.operations == 2 * counted.operations
    assert twice.runs == 2


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), actions, st.data())
def test_a_forged_body_is_explained_not_crashed_on(
    started: bool, moves: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    journal = journal_of(started, moves)
    for _ in range(3):
        row = data.draw(st.sampled_from(journal.rows))
        name = data.draw(st.sampled_from(sorted(row.body)))
        row.body[name] = data.draw(junk)
    why = explain(journal.rows, now_us=journal.at, intact=False)
    assert str(why)
    json.dumps(why.to_dict())
    assert why.exit_code == 7
