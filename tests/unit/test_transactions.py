"""The transition table, the plan's order, results and errors of a completion."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, fields, replace

import pytest

from spine.governance import transactions
from spine.governance.flags import flag
from spine.governance.transactions import (
    STEP_MOVES,
    TX_MOVES,
    CompleteRun,
    CompletionConflict,
    DomainResult,
    IllegalTransition,
    RollbackAction,
    RollbackNotSupportedError,
    RunCompletionTransaction,
    StepState,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
    TxState,
    completion_digest,
    completion_problems,
    moment,
    move_step,
    move_tx,
    phase_reached,
    plan_order,
)
from spine.kernel.errors import ConfigurationError, SpineError

T, S = TxState, StepState


@dataclass
class Named:
    name: str
    after: tuple[str, ...] = ()


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def names(domains: tuple[Named, ...]) -> list[str]:
    return [domain.name for domain in domains]


class TestTable:
    def test_transaction_moves_are_exactly_the_design(self) -> None:
        assert {(move.source.value, move.target.value) for move in TX_MOVES} == {
            ("EXECUTING", "COMMITTED"),
            ("EXECUTING", "COMPENSATING"),
            ("COMPENSATING", "ABORTED"),
            ("COMPENSATING", "PARKED"),
            ("PARKED", "COMPENSATING"),
            ("PARKED", "ABORTED_MANUAL"),
        }

    def test_step_moves_are_exactly_the_design(self) -> None:
        found = {(source.value, move.target.value) for move in STEP_MOVES for source in move.sources}
        undone = {(state, "RB_INTENT") for state in ("INTENT", "DONE", "REFUSED", "UNKNOWN", "PARKED")}
        assert found == undone | {
            ("PLANNED", "INTENT"),
            ("INTENT", "DONE"),
            ("INTENT", "REFUSED"),
            ("INTENT", "UNKNOWN"),
            ("RB_INTENT", "ROLLED_BACK"),
            ("RB_INTENT", "PARKED"),
        }

    def test_final_states(self) -> None:
        assert {state for state in T if state.final} == {T.COMMITTED, T.ABORTED, T.ABORTED_MANUAL}

    def test_commit_needs_every_step_done(self) -> None:
        assert move_tx(T.EXECUTING, T.COMMITTED, [S.DONE, S.DONE]) is T.COMMITTED
        with pytest.raises(IllegalTransition, match="every step DONE; found UNKNOWN"):
            move_tx(T.EXECUTING, T.COMMITTED, [S.DONE, S.UNKNOWN])

    @pytest.mark.parametrize("state", [s for s in S if s not in (S.PLANNED, S.ROLLED_BACK)])
    def test_nothing_is_aborted_while_a_step_may_have_an_effect(self, state: StepState) -> None:
        with pytest.raises(IllegalTransition, match=state.value):
            move_tx(T.COMPENSATING, T.ABORTED, [S.PLANNED, state, S.ROLLED_BACK])

    def test_a_transaction_parks_only_with_a_parked_step(self) -> None:
        assert move_tx(T.COMPENSATING, T.PARKED, [S.PARKED, S.ROLLED_BACK]) is T.PARKED
        with pytest.raises(IllegalTransition, match="a step that is PARKED"):
            move_tx(T.COMPENSATING, T.PARKED, [S.ROLLED_BACK])

    def test_no_rollback_before_the_abort_decision(self) -> None:
        with pytest.raises(IllegalTransition, match="DONE to RB_INTENT in a transaction EXECUTING"):
            move_step(S.DONE, S.RB_INTENT, T.EXECUTING)

    def test_no_forward_after_the_abort_decision(self) -> None:
        with pytest.raises(IllegalTransition):
            move_step(S.PLANNED, S.INTENT, T.COMPENSATING)
        with pytest.raises(IllegalTransition):
            move_step(S.INTENT, S.DONE, T.COMPENSATING)

    def test_a_refused_step_is_undone_too(self) -> None:
        assert move_step(S.REFUSED, S.RB_INTENT, T.COMPENSATING) is S.RB_INTENT

    @pytest.mark.parametrize("left", [S.INTENT, S.REFUSED, S.UNKNOWN, S.RB_INTENT])
    def test_nothing_is_parked_beside_a_step_that_is_still_to_be_undone(self, left: S) -> None:
        with pytest.raises(IllegalTransition, match="park: a transaction needs every step"):
            move_tx(T.COMPENSATING, T.PARKED, [S.PARKED, left])
        assert move_tx(T.COMPENSATING, T.PARKED, [S.PARKED, S.DONE, S.ROLLED_BACK, S.PLANNED]) is T.PARKED


class TestOrder:
    def test_as_declared_where_nothing_is_demanded(self) -> None:
        assert names(plan_order([Named("b"), Named("a"), Named("c")])) == ["b", "a", "c"]

    def test_after_comes_first(self) -> None:
        assert names(plan_order([Named("a", ("c",)), Named("b"), Named("c", ("b",))])) == ["b", "c", "a"]

    def test_an_unknown_domain_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match="'a' is to come after 'x', which is not a domain here"):
            plan_order([Named("a", ("x",))])

    def test_a_domain_declared_twice_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match="'a' is declared twice"):
            plan_order([Named("a"), Named("b"), Named("a")])

    def test_a_circle_is_shown(self) -> None:
        with pytest.raises(ConfigurationError, match="b -> c -> b"):
            plan_order([Named("a", ("b",)), Named("b", ("c",)), Named("c", ("b",)), Named("d")])

    def test_a_domain_that_waits_for_itself(self) -> None:
        with pytest.raises(ConfigurationError, match="a -> a"):
            plan_order([Named("a", ("a",))])

    def test_domains_that_call_themselves_equal_are_still_two(self) -> None:
        class Same(Named):
            def __eq__(self, other: object) -> bool:
                return True

            __hash__ = None  # type: ignore[assignment]

        assert names(plan_order([Same("a", ("b",)), Same("b")])) == ["b", "a"]


class TestResult:
    incident = DomainResult("incidents", "create_incident", "i-1", True, timestamp=moment(1_700_000_000_123_456))
    other = DomainResult("billing", "complete_run", None, False, "no funds", None, "NO_FUNDS", "REFUSED", "EXTERNAL")

    def test_the_legacy_fields_are_filled_by_name(self) -> None:
        result = TransactionResult.of("r", [self.incident, self.other], phase=TransactionPhase.COMMITTED)
        assert result.incident_result is self.incident
        assert result.policy_result is None
        assert not result.all_domains_succeeded
        assert result.is_complete

    def test_it_survives_json(self) -> None:
        result = TransactionResult.of(
            "r",
            [self.incident, self.other],
            phase=TransactionPhase.EVENTS_PUBLISHED,
            transaction_id="tx",
            tenant_id="acme",
            run_status="succeeded",
            events_published=["run.completed"],
            duration_ms=7,
            metadata={"governance_active": True, "authority_degraded": True},
        )
        assert TransactionResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
        assert result.degraded
        assert result.flagged

    def test_the_legacy_keys_are_there(self) -> None:
        body = TransactionResult("r", self.incident).to_dict()
        assert body["incident"]["result_id"] == "i-1"
        assert body["phase"] == "NOT_STARTED"
        assert {"policy", "trace", "is_complete", "all_domains_succeeded", "events_published", "duration_ms"} <= set(
            body
        )

    def test_bypassed_is_flagged_but_not_degraded(self) -> None:
        result = TransactionResult("r", metadata={"governance_active": False})
        assert result.flagged
        assert not result.degraded

    def test_phases_keep_the_legacy_words(self) -> None:
        assert [phase.value for phase in TransactionPhase] == [
            "NOT_STARTED",
            "INCIDENT_CREATED",
            "POLICY_EVALUATED",
            "TRACE_COMPLETED",
            "COMMITTED",
            "EVENTS_PUBLISHED",
            "ROLLED_BACK",
            "FAILED",
            "PARKED",
        ]
        assert TransactionPhase.COMMITTED == "COMMITTED"

    def test_the_phase_reached(self) -> None:
        assert phase_reached([]) is TransactionPhase.NOT_STARTED
        assert phase_reached(["incidents", "mine", "policies", "other"]) is TransactionPhase.POLICY_EVALUATED

    def test_a_rollback_action_is_built_as_before(self) -> None:
        action = RollbackAction("incidents", "create_incident", lambda: None, "i-1")
        assert (action.result_id, action.executed) == ("i-1", False)


class TestErrors:
    def failed(self, cause: BaseException | None) -> TransactionFailed:
        partial = TransactionResult.of("r", [TestResult.other], phase=TransactionPhase.INCIDENT_CREATED).to_dict()
        return TransactionFailed(
            "no", TransactionPhase.INCIDENT_CREATED, partial, cause, code="C", failed_domain="d", transaction_id="t"
        )

    def test_a_failure_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(self.failed(ValueError("x"))))
        assert (error.message, error.phase, error.code, error.failed_domain, error.transaction_id, str(error)) == (
            "no",
            TransactionPhase.INCIDENT_CREATED,
            "C",
            "d",
            "t",
            "no",
        )
        assert isinstance(error.cause, ValueError)
        assert error.__cause__ is error.cause
        assert error.domains == (TestResult.other,)

    def test_a_cause_that_cannot_be_pickled_is_told(self) -> None:
        error = pickle.loads(pickle.dumps(self.failed(Unpicklable("one", "two"))))
        assert type(error.cause) is SpineError
        assert str(error.cause) == "Unpicklable: one"

    def test_the_legacy_arguments_by_position(self) -> None:
        error = TransactionFailed("no", TransactionPhase.FAILED)
        assert error.partial_results == {}
        assert error.cause is None

    def test_all_are_spine_errors(self) -> None:
        for kind in (TransactionFailed, CompletionConflict, RollbackNotSupportedError, IllegalTransition):
            assert issubclass(kind, SpineError)


class TestRequest:
    request = CompleteRun("run-1", "acme", "succeeded")

    def test_execute_asks_with_every_argument(self) -> None:
        asked: list[CompleteRun] = []

        def ask(request: CompleteRun) -> str:
            asked.append(request)
            return "answer"

        arguments = {
            "run_id": "r",
            "tenant_id": "t",
            "run_status": "failed",
            "agent_id": "a",
            "error_code": "E",
            "error_message": "m",
            "trace_id": "tr",
            "is_synthetic": True,
            "synthetic_scenario_id": "s",
            "skip_events": True,
        }
        assert RunCompletionTransaction(ask).execute(**arguments) == "answer"
        assert asked == [CompleteRun(**arguments)]
        RunCompletionTransaction(ask).execute("r", "t", "failed", "a", "E", "m", "tr", True, "s", True)
        assert asked[1] == asked[0]

    def test_the_digest_covers_each_field_of_the_payload(self) -> None:
        digest = completion_digest(self.request)
        assert digest == completion_digest(replace(self.request, run_id="another", completion_key="k"))
        for field in fields(self.request):
            if field.name in ("run_id", "completion_key"):
                continue
            value = True if field.name in ("is_synthetic", "skip_events") else "changed"
            assert completion_digest(replace(self.request, **{field.name: value})) != digest, field.name

    def test_a_sound_request_has_no_problems(self) -> None:
        assert completion_problems(self.request) == ()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"run_id": ""}, "run_id"),
            ({"run_id": " "}, "run_id"),
            ({"tenant_id": None}, "tenant_id"),
            ({"run_status": 5}, "run_status"),
            ({"agent_id": "a\x00b"}, "agent_id"),
            ({"error_message": "\ud800"}, "error_message"),
            ({"error_message": "x" * 70_000}, "error_message"),
            ({"trace_id": "x" * 600}, "trace_id"),
            ({"completion_key": "\x00"}, "completion_key"),
            ({"is_synthetic": "yes"}, "is_synthetic"),
        ],
    )
    def test_each_problem_names_its_field(self, change: dict[str, object], told: str) -> None:
        problems = completion_problems(replace(self.request, **change))
        assert len(problems) == 1
        assert told in problems[0]

    def test_all_problems_at_once(self) -> None:
        assert len(completion_problems(CompleteRun("", "", "", agent_id="\x00"))) == 4

    def test_text_that_is_not_unicode_has_no_digest(self) -> None:
        with pytest.raises(ValueError, match="run-1"):
            completion_digest(replace(self.request, error_message="\ud800"))


class TestFlags:
    @pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), (" Off ", False), ("YES", True)])
    def test_words(self, text: str, value: bool) -> None:
        assert flag("X", default=not value, environ={"X": text}) is value

    def test_unset_and_empty_give_the_default(self) -> None:
        assert flag("X", default=True, environ={}) is True
        assert flag("X", default=False, environ={"X": " "}) is False

    def test_another_word_is_refused_not_guessed(self) -> None:
        with pytest.raises(ConfigurationError, match="X is 'ture': set it to true or false"):
            flag("X", default=True, environ={"X": "ture"})

    def test_read_from_the_environment_at_import(self) -> None:
        script = (
            "from compat.transaction_coordinator import *\n"
            "print(RAC_ROLLBACK_AUDIT_ENABLED, TRANSACTION_COORDINATOR_ENABLED)"
        )
        environment = {**os.environ, "RAC_ROLLBACK_AUDIT_ENABLED": "false"}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["False", "True"]


def test_what_transactions_exports_exists() -> None:
    assert [name for name in transactions.__all__ if not hasattr(transactions, name)] == []
