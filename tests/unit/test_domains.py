"""The built-in domains' rows and what a user's own domain must look like."""

from __future__ import annotations

import json
import pickle
import uuid
from uuid import UUID, uuid5

import pytest

from actors.completion import Plan, next_asked, steps_of
from spine.built_in import BUILT_INS, lesson_row, outcome_of, policy_evaluation_row
from spine.domains import Local, Refused, RunFacts, effect_id
from spine.effects import Effect
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson, RunGovernanceFacade
from spine.governance.transactions import CompleteRun, DomainClass, StepState
from spine.governance.units import Write
from spine.kernel.errors import ConfigurationError
from spine.parts import part_of, participants

TX = "01890a5d-ac96-774b-bcce-b302099a8057"
FACTS = RunFacts(
    "run-1", "acme", "failed", TX, 1_700_000_000_000_000, agent_id="a7", error_code="E", trace_id="tr", operations=3
)


class Billing:
    name = "billing"
    after = ("incidents",)

    def plan(self, run: RunFacts) -> list[Write]:
        return [Write("INSERT INTO bills VALUES (:id)", {"id": run.effect_id})]


class Made:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


def rows_of(run: RunFacts) -> dict[str, dict[str, object]]:
    return {row.table: dict(row.values) for d in BUILT_INS for row in d.rows(run.seen_by(d.name))}


def test_every_completion_leaves_an_incident_an_evaluation_and_a_trace() -> None:
    assert list(rows_of(FACTS)) == ["incidents", "policy_evaluations", "traces"]


def test_ids_are_derived_from_transaction_and_domain() -> None:
    rows = rows_of(FACTS)
    assert rows["incidents"]["id"] == str(uuid5(UUID(TX), "incidents")) == effect_id(TX, "incidents")
    assert rows == rows_of(FACTS)
    assert len({row["id"] for row in rows.values()}) == 3


def test_all_rows_have_the_same_columns() -> None:
    for row in rows_of(FACTS).values():
        assert sorted(row) == [
            "created_at",
            "detail",
            "id",
            "is_synthetic",
            "kind",
            "run_id",
            "status",
            "synthetic_scenario_id",
            "tenant_id",
        ]
        assert row["created_at"] == FACTS.completed_at


@pytest.mark.parametrize(
    ("status", "kind", "incident", "severity", "policy"),
    [
        ("succeeded", "EXECUTION_SUCCESS", "CLOSED", "NONE", "no_violation"),
        ("FAILED", "EXECUTION_FAILURE", "OPEN", "ERROR", "violation_incident"),
        ("halted", "EXECUTION_BLOCKED", "OPEN", "WARNING", "advisory"),
        ("cancelled", "EXECUTION_ABORTED", "CLOSED", "INFO", "not_applicable"),
        ("sucseeded", "EXECUTION_UNKNOWN", "OPEN", "WARNING", "not_applicable"),
    ],
)
def test_severity_by_status(status: str, kind: str, incident: str, severity: str, policy: str) -> None:
    rows = rows_of(RunFacts("r", "t", status, TX, 0))
    assert (rows["incidents"]["kind"], rows["incidents"]["status"]) == (kind, incident)
    assert json.loads(str(rows["incidents"]["detail"]))["severity"] == severity
    assert rows["policy_evaluations"]["status"] == policy


def test_the_detail_says_what_was_said() -> None:
    rows = rows_of(FACTS)
    assert json.loads(str(rows["incidents"]["detail"])) == {
        "outcome": "FAILURE",
        "severity": "ERROR",
        "run_status": "failed",
        "agent_id": "a7",
        "error_code": "E",
        "error_message": None,
    }
    assert json.loads(str(rows["traces"]["detail"]))["trace_id"] == "tr"
    assert json.loads(str(rows["policy_evaluations"]["detail"]))["operations"] == 3


def test_an_unknown_status_is_never_a_success() -> None:
    assert outcome_of("").name == "UNKNOWN"


class TestFacadeRows:
    source = uuid.UUID(int=7)

    def asked(self, call: str, *arguments: object, **named: object) -> object:
        return getattr(RunGovernanceFacade(lambda request: request), call)(*arguments, **named)  # type: ignore[arg-type,call-overload]

    def test_an_evaluation(self) -> None:
        request = self.asked("create_policy_evaluation", "r", "t", "succeeded", 4, True, "s")
        assert request == CreatePolicyEvaluation("r", "t", "succeeded", 4, True, "s")
        row = policy_evaluation_row(request, id="p-1", at=5)  # type: ignore[arg-type]
        assert (row.table, row.id, row.values["status"], row.values["is_synthetic"]) == (
            "policy_evaluations",
            "p-1",
            "no_violation",
            True,
        )
        assert json.loads(row.values["detail"])["policies_checked"] == 4

    def test_a_near_threshold_lesson(self) -> None:
        request = self.asked("emit_near_threshold_lesson", "t", "budget", 87.5, 100.0, 87.5, self.source)
        assert isinstance(request, EmitLesson)
        row = lesson_row(request, id="l-1", at=5)
        assert (row.table, row.values["kind"], row.values["run_id"]) == ("lessons", "near_threshold", str(self.source))
        assert json.loads(row.values["detail"]) == {
            "metric": "budget",
            "utilization": 87.5,
            "threshold_value": 100.0,
            "current_value": 87.5,
            "window": "24h",
            "source_event_id": str(self.source),
        }

    def test_a_critical_success_lesson(self) -> None:
        request = self.asked(
            "emit_critical_success_lesson", "t", "cost", {"under": 50.0}, self.source, is_synthetic=True
        )
        assert isinstance(request, EmitLesson)
        row = lesson_row(request, id="l-1", at=5)
        assert row.values["kind"] == "critical_success"
        assert json.loads(row.values["detail"])["metrics"] == {"under": 50.0}

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), object(), "\ud800", {"deep": float("nan")}])
    def test_what_is_not_json_is_refused_not_bent(self, bad: object) -> None:
        request = EmitLesson("critical_success", "t", "e", {"metrics": {"value": bad}})
        with pytest.raises(ValueError, match="cannot be recorded as JSON"):
            lesson_row(request, id="l", at=0)

    def test_nesting_without_end_is_refused(self) -> None:
        deep: dict[str, object] = {}
        for _ in range(100_000):
            deep = {"d": deep}
        with pytest.raises(ValueError, match="cannot be recorded"):
            lesson_row(EmitLesson("critical_success", "t", "e", deep), id="l", at=0)


class TestParticipants:
    def test_built_ins_come_with_every_completion(self) -> None:
        assert [d.name for d in participants([])] == ["incidents", "policies", "traces"]
        assert [d.name for d in participants([Billing()])] == ["incidents", "policies", "traces", "billing"]

    def test_a_users_domain_may_be_waited_for(self) -> None:
        first = Made(name="first", after=(), plan=lambda run: [])
        second = Made(name="second", after=("first", "traces"), plan=lambda run: [])
        assert [d.name for d in participants([second, first])][-2:] == ["first", "second"]

    def test_actions(self) -> None:
        assert [part.action for part in participants([Billing()])] == [
            "create_incident",
            "evaluate_policy",
            "complete_trace",
            "complete_run",
        ]

    def test_a_class_with_plan_is_local(self) -> None:
        assert isinstance(Billing(), Local)
        assert part_of(Billing()).cls is DomainClass.LOCAL

    def test_what_a_domain_declares_is_read_once(self) -> None:
        """A `name` that is another one at each look, or an `after` that is changed later, confuses no plan."""

        class Restless(Billing):
            looks = 0
            after = ["incidents"]

            @property
            def name(self) -> str:  # type: ignore[override]
                self.looks += 1
                return f"restless-{self.looks}"

        domain = Restless()
        parts = participants([domain])
        domain.after.append("nobody")
        found = parts[-1]
        assert (found.name, found.after, domain.looks) == ("restless-1", ("incidents",), 1)
        assert (found.promise.domain, found.promise.action) == ("restless-1", "complete_run")

    @pytest.mark.parametrize(
        "after",
        [
            iter(["traces"]),
            (name for name in ["traces"]),
            {"traces"},
            frozenset(),
            {"traces": 1},
            range(0),
            ("a", 5),
            None,
        ],
    )
    def test_what_a_domain_comes_after_is_a_tuple_or_list(self, after: object) -> None:
        """An iterator would be empty at the second look, and its dependency gone without a word."""
        domain = Made(name="x", after=after, plan=print)
        with pytest.raises(ConfigurationError, match=r"domain .x.: `after` must be a tuple or list.*; found ") as told:
            participants([domain])
        assert repr(after) in str(told.value)

    @pytest.mark.parametrize(
        ("domain", "told"),
        [
            (Made(name="x", after=()), "domain 'x' .Made. cannot take part in a completion: it has neither plan"),
            (Made(name="x", after=(), plan=5), "domain 'x'"),
            (Made(name="", after=(), plan=print), "has no name"),
            (Made(after=(), plan=print), "has no name"),
            (Made(name="x", plan=print), "domain 'x': `after` must be a tuple"),
            (Made(name="x", after="incidents", plan=print), "domain 'x': `after` must be a tuple"),
            (Billing, "domain 'billing' is the class Billing: pass an instance"),
            (Made(name="incidents", after=(), plan=print), "'incidents' is declared twice"),
            (Made(name="x", after=("nobody",), plan=print), "'nobody'"),
            (object(), "has no name"),
        ],
    )
    def test_what_cannot_take_part_is_named(self, domain: object, told: str) -> None:
        with pytest.raises(ConfigurationError, match=told):
            participants([domain])


def test_a_refusal_keeps_code_and_reason_through_pickling() -> None:
    refused = pickle.loads(pickle.dumps(Refused("NO_FUNDS", "account is empty")))
    assert (refused.code, refused.reason, str(refused)) == (
        "NO_FUNDS",
        "account is empty",
        "NO_FUNDS: account is empty",
    )


def test_a_refusal_is_text_whatever_it_was_given() -> None:
    refused = Refused(402, None)  # type: ignore[arg-type]
    assert (refused.code, refused.reason) == ("402", "None")


def test_a_part_is_what_its_domain_declared_whatever_it_says_later() -> None:
    """Its deadline and attempts are read once, before they are checked: a property that fails later ends no saga."""

    class Moody:
        name, after, attempts = "pay", (), 7
        asked = 0

        @property
        def timeout_s(self) -> float:
            self.asked += 1
            if self.asked > 1:
                raise KeyError("the configuration was reloaded")
            return 2.5

        async def forward(self, effect: Effect) -> None: ...

        async def rollback(self, effect: Effect) -> None: ...

    (part,) = [part for part in participants([Moody()]) if part.name == "pay"]
    (step,) = steps_of([part], TX)
    assert (part.timeout_s, part.attempts) == (step.timeout_s, step.attempts) == (2.5, 7)


def test_of_those_that_may_have_ended_their_drivers_the_next_to_be_asked_is_meant() -> None:
    """What stands before a domain that was sent to had its turn; what is done, and Spine's own, is not asked again."""

    class Outside:
        def __init__(self, name: str, *after: str) -> None:
            self.name, self.after = name, after

        async def forward(self, effect: Effect) -> None: ...

        async def rollback(self, effect: Effect) -> None: ...

    declared = [
        Billing(),
        Outside("pay", "billing"),
        Outside("ship", "pay"),
        Made(name="book", after=("ship",), plan=list),
    ]
    steps = steps_of(participants(declared), TX)
    request = CompleteRun("run-1", "acme", "succeeded")
    plan = Plan(request, TX, 1, None, "", {}, 0, 0, "", steps)
    by_name = {step.name: step for step in steps}

    def meant() -> str | None:
        found = next_asked(plan)
        return None if found is None else found.name

    assert meant() == "billing"
    by_name["pay"].state = StepState.INTENT
    assert meant() == "pay"
    by_name["pay"].state = StepState.DONE
    assert meant() == "ship"
    by_name["ship"].state = StepState.DONE
    assert meant() == "book"
    del plan.steps[-1]
    assert meant() is None
