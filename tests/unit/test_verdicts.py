"""The verdict over a run's contract as a record: when there is one, what it says, and what it replaces."""

from __future__ import annotations

from typing import Any

import pytest

from actors.records import ack, run_started
from actors.verdicts import judge, lacking, with_verdict
from spine.explain.contract import read_contract
from spine.governance.authority import GovernanceState, check_start
from spine.governance.contract import FINALIZE, Expectation, promised
from spine.governance.units import Record
from tests.unit.explain_rows import Row

SECOND = 1_000_000
STARTED = 10 * SECOND
DEADLINE = STARTED + 3600 * SECOND
OWN = (("incidents", "create_incident"), ("policies", "evaluate_policy"))


def start(*expectations: Expectation, block_unmet: bool = False) -> list[Record]:
    state = GovernanceState()
    return run_started(
        "run-1", "acme", None, check_start(state), state, at=STARTED, instance="i", implicit=False,
        expectations=promised([Expectation(*key) for key in OWN], expectations), block_unmet=block_unmet,
    )  # fmt: skip


def report(domain: str, action: str, status: str = "SUCCESS", tenant: str = "acme", **more: Any) -> Record:
    return ack("run-1", tenant, domain, action, at=STARTED, tx_id="t", status=status, **more)


def written(*records: Record, seq: int = 5) -> list[Row]:
    """The records as journal rows from row ``seq`` on."""
    bodies = [{**record.fields, "kind": record.kind, "at": record.at} for record in records]
    return [Row(place, body) for place, body in enumerate(bodies, start=seq)]


def done() -> list[Record]:
    return [*(report(*key) for key in OWN), report(*FINALIZE)]


def test_a_start_is_due_at_its_first_deadline_that_it_does_not_meet_itself() -> None:
    assert start()[0].fields["due_at"] == DEADLINE
    assert start(Expectation("mail", "send", 5))[0].fields["due_at"] == STARTED + 5 * SECOND
    assert start()[0].fields["block_unmet"] is False


def test_a_unit_that_completes_the_run_carries_the_verdict_last() -> None:
    rows = written(*start())
    *records, verdict = with_verdict(done(), rows, at=STARTED + 1)
    assert records == done()
    assert verdict == Record(
        "contract.reconciled",
        STARTED + 1,
        {
            "run_id": "run-1", "tenant_id": "acme", "overall": "COMPLETE", "was": "PENDING", "missing": [], "drift": [],
            "failed": [], "stale": [], "pending": [], "due_at": None, "previous": 5,
        },
    )  # fmt: skip


def test_a_run_that_starts_in_the_unit_is_judged_there_and_left_to_nobody_else() -> None:
    """The start's own row of the table is not written first to be changed at once: the verdict writes it."""
    unit = [*start(), *done()]
    started, *_, verdict = with_verdict(unit, [], at=STARTED)
    assert (started.fields["due_at"], verdict.fields["previous"], verdict.fields["overall"]) == (None, None, "COMPLETE")
    assert unit[0].fields["due_at"] == DEADLINE, "what was given is not changed"


def test_a_unit_that_only_starts_the_run_is_left_as_it_is() -> None:
    assert with_verdict(start(), [], at=STARTED) == start()


def test_an_aborted_completion_is_incomplete_and_still_due() -> None:
    failed = [report(*OWN[0], "FAILED", error="disk"), report(*FINALIZE, "FAILED", error="disk")]
    for unit, rows in (([*start(), *failed], []), (failed, written(*start()))):
        verdict = with_verdict(unit, rows, at=STARTED)[-1].fields
        assert (verdict["overall"], verdict["due_at"]) == ("INCOMPLETE", DEADLINE)
        assert [(f["domain"], f["error"]) for f in verdict["failed"]] == [
            ("incidents", "disk"), ("orchestrator", "disk"),
        ]  # fmt: skip
        assert [f["domain"] for f in verdict["pending"]] == ["policies"]


def test_a_verdict_that_stands_is_not_recorded_again() -> None:
    rows = written(*with_verdict([*start(), *done()], [], at=STARTED))
    for more in (done(), [report("nobody", "asked")], []):
        unit = with_verdict(more, rows, at=STARTED + 7200 * SECOND)
        assert [record.kind for record in unit] == ["ack"] * len(more)


def test_a_report_that_leaves_the_verdict_as_it_was_names_the_row_it_was_judged_by() -> None:
    """The last one of its unit: another unit that was judged by the same row does not stand beside it."""
    rows = written(*with_verdict([*start(), *done()], [], at=STARTED))
    *others, last = with_verdict(done(), rows, at=STARTED + 1)
    assert others == done()[:-1]
    assert last.fields == {**done()[-1].fields, "contract": rows[-1].seq}
    later = read_contract([*rows, *written(last, seq=20)])
    assert later is not None
    assert (later.seq, later.standing) == (20, "COMPLETE")


def test_a_taken_back_success_changes_the_verdict_and_names_the_row_it_replaces() -> None:
    rows = written(*with_verdict([*start(), *done()], [], at=STARTED))
    verdict = with_verdict([report(*OWN[0], "ROLLED_BACK")], rows, at=STARTED + 1)[-1].fields
    assert (verdict["overall"], verdict["was"], verdict["previous"]) == ("INCOMPLETE", "COMPLETE", rows[-1].seq)
    assert [f["error"] for f in verdict["failed"]] == ["rolled back"]


def test_drift_is_told_where_a_verdict_is() -> None:
    verdict = with_verdict([report("nobody", "asked"), *done()], written(*start()), at=STARTED)[-1].fields
    assert [(f["domain"], f["verdict"]) for f in verdict["drift"]] == [("nobody", "drift")]
    assert verdict["overall"] == "COMPLETE"


def test_an_earlier_moment_that_is_met_moves_the_next_one() -> None:
    rows = written(*start(Expectation("mail", "send", 5)))
    verdict = with_verdict([report("mail", "send")], rows, at=STARTED)[-1].fields
    assert (verdict["overall"], verdict["due_at"]) == ("PENDING", DEADLINE)


def test_another_tenants_rows_have_no_say() -> None:
    """Before a run exists anybody may be refused under its id."""
    rows = written(report(*OWN[0]), *start(), *(report(*key, tenant="other") for key in OWN))
    contract = read_contract(rows)
    assert contract is not None
    assert (contract.tenant_id, contract.seq, len(contract.acks)) == ("acme", 6, 1)
    assert judge(contract, STARTED)[1] is None


def test_nothing_promised_and_nothing_started_are_never_judged() -> None:
    state = GovernanceState()
    plain = run_started(
        "run-1", "acme", None, check_start(state), state, at=STARTED, instance="i", implicit=True, expectations=()
    )
    assert plain[0].fields["due_at"] is None
    assert with_verdict(done(), written(*plain), at=DEADLINE * 2) == done()
    assert with_verdict(done(), [], at=STARTED) == done()


@pytest.mark.parametrize("deadline_s", [float("inf"), float("nan"), "soon", None])
def test_a_forged_deadline_is_no_promise(deadline_s: Any) -> None:
    rows = written(*start())
    rows[0].body["expectations"] = [{"domain": "a", "action": "b", "deadline_s": deadline_s}]
    contract = read_contract(rows)
    assert contract is not None and contract.dues == ()


def test_only_a_run_that_blocks_on_its_contract_lacks_anything() -> None:
    promise = Expectation("billing", "charge", 5)
    assert lacking(written(*start(promise)), OWN) == ()
    assert lacking([], OWN) == ()
    rows = written(*start(promise, block_unmet=True))
    assert [str(finding) for finding in lacking(rows, OWN)] == ["billing/charge missing"]
    rows = written(*start(promise, block_unmet=True), report("billing", "charge"))
    assert lacking(rows, OWN) == ()
