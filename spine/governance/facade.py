"""What a worker reports beside a run's completion: policy evaluations and lessons, as requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload
from uuid import UUID

from spine.governance.flags import RAC_ENABLED
from spine.kernel.messages import Request

__all__ = [
    "RAC_ENABLED",
    "CreatePolicyEvaluation",
    "EmitLesson",
    "LessonAsk",
    "RunGovernanceFacade",
]


@dataclass(slots=True)
class CreatePolicyEvaluation(Request[str | None]):
    """Asks the coordinator to record a policy evaluation; answers its id, or None when it could not be recorded."""

    run_id: str
    tenant_id: str
    run_status: str
    policies_checked: int = 0
    is_synthetic: bool = False
    synthetic_scenario_id: str | None = None


@dataclass(slots=True)
class EmitLesson(Request[UUID | None]):
    """Asks the coordinator to record a lesson; answers its id, or None when it could not be recorded.

    ``lesson`` is ``near_threshold`` or ``critical_success``; ``source_event_id`` the run or event that taught it.
    """

    lesson: str
    tenant_id: str
    source_event_id: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    is_synthetic: bool = False
    synthetic_scenario_id: str | None = None


P = TypeVar("P", covariant=True)
L = TypeVar("L", covariant=True)


class LessonAsk(Protocol[P, L]):
    """An ask that knows both requests; it answers None, and never raises, where something cannot be recorded."""

    @overload
    def __call__(self, request: CreatePolicyEvaluation, /) -> P: ...

    @overload
    def __call__(self, request: EmitLesson, /) -> L: ...


class RunGovernanceFacade(Generic[P, L]):
    """Records through the ``ask`` it was given: awaitables where that is async, values where it blocks."""

    __slots__ = ("_ask",)

    def __init__(self, ask: LessonAsk[P, L]) -> None:
        self._ask = ask

    def create_policy_evaluation(
        self,
        run_id: str,
        tenant_id: str,
        run_status: str,
        policies_checked: int = 0,
        is_synthetic: bool = False,
        synthetic_scenario_id: str | None = None,
    ) -> P:
        """Record that the run's policies were evaluated; the evaluation's id, or None."""
        return self._ask(
            CreatePolicyEvaluation(run_id, tenant_id, run_status, policies_checked, is_synthetic, synthetic_scenario_id)
        )

    def emit_near_threshold_lesson(
        self,
        tenant_id: str,
        metric: str,
        utilization: float,
        threshold_value: float,
        current_value: float,
        source_event_id: UUID,
        window: str = "24h",
        is_synthetic: bool = False,
        synthetic_scenario_id: str | None = None,
    ) -> L:
        """Record that ``metric`` came near its limit (``utilization`` in percent); the lesson's id, or None."""
        detail = {
            "metric": metric,
            "utilization": utilization,
            "threshold_value": threshold_value,
            "current_value": current_value,
            "window": window,
        }
        return self._ask(
            EmitLesson("near_threshold", tenant_id, str(source_event_id), detail, is_synthetic, synthetic_scenario_id)
        )

    def emit_critical_success_lesson(
        self,
        tenant_id: str,
        success_type: str,
        metrics: Mapping[str, Any],
        source_event_id: UUID,
        is_synthetic: bool = False,
        synthetic_scenario_id: str | None = None,
    ) -> L:
        """Record what a run did notably well, with its ``metrics``; the lesson's id, or None."""
        detail = {"success_type": success_type, "metrics": metrics}
        return self._ask(
            EmitLesson("critical_success", tenant_id, str(source_event_id), detail, is_synthetic, synthetic_scenario_id)
        )
