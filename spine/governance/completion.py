"""The completion of a run as a request: its fields, its digest, and the canonical class that sends it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, TypeVar

import orjson

from spine.governance.params import id_problem, text_problem
from spine.governance.results import TransactionResult
from spine.kernel.messages import Request

T = TypeVar("T")

MESSAGE_MOST: Final = 65_536
COMPLETE_S: Final = 120.0


@dataclass(slots=True)
class CompleteRun(Request[TransactionResult]):
    """Asks the coordinator to complete a run: every domain or none.

    ``timeout_s`` seconds bound the wait for the answer, not the work: room for domains that hang and are undone.
    """

    run_id: str
    tenant_id: str
    run_status: str
    agent_id: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    trace_id: str | None = None
    is_synthetic: bool = False
    synthetic_scenario_id: str | None = None
    skip_events: bool = False
    completion_key: str = ""
    timeout_s: ClassVar[float] = COMPLETE_S


def completion_problems(request: CompleteRun) -> tuple[str, ...]:
    """Every field of ``request`` that cannot be recorded, with the reason; empty when it is sound."""
    found = (
        *(id_problem(name, getattr(request, name)) for name in ("run_id", "tenant_id", "run_status")),
        *(
            id_problem(name, getattr(request, name), optional=True)
            for name in ("agent_id", "error_code", "trace_id", "synthetic_scenario_id")
        ),
        None if request.error_message is None else _message_problem(request.error_message),
        None if request.completion_key == "" else id_problem("completion_key", request.completion_key),
        *(_flag_problem(name, getattr(request, name)) for name in ("is_synthetic", "skip_events")),
    )
    return tuple(problem for problem in found if problem is not None)


def _flag_problem(name: str, value: object) -> str | None:
    return None if isinstance(value, bool) else f"{name} must be true or false, not {type(value).__name__}"


def _message_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"error_message must be text, not {type(value).__name__}"
    if len(value) > MESSAGE_MOST:
        return f"error_message has {len(value)} characters, at most {MESSAGE_MOST} are taken"
    problem = text_problem(value)
    return None if problem is None else f"error_message {problem}"


def completion_payload(request: CompleteRun) -> dict[str, str | bool | None]:
    """What two completions under one key must agree in."""
    return {
        "tenant_id": request.tenant_id,
        "run_status": request.run_status,
        "agent_id": request.agent_id,
        "error_code": request.error_code,
        "error_message": request.error_message,
        "trace_id": request.trace_id,
        "is_synthetic": request.is_synthetic,
        "synthetic_scenario_id": request.synthetic_scenario_id,
        "skip_events": request.skip_events,
    }


def completion_digest(request: CompleteRun) -> str:
    """SHA-256 (hex) of the payload as canonical JSON: two completions under one key are the same when it is equal.

    Raises ValueError on text that is not Unicode; ``completion_problems`` names the field.
    """
    try:
        text = orjson.dumps(completion_payload(request), option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise ValueError(f"the completion of run {request.run_id!r} is not canonical JSON: {error}") from error
    return hashlib.sha256(text).hexdigest()


class RunCompletionTransaction(Generic[T]):
    """Completes runs through the ``ask`` it was given: an awaitable where that is async, a result where it blocks."""

    __slots__ = ("_ask",)

    def __init__(self, ask: Callable[[CompleteRun], T]) -> None:
        self._ask = ask

    def execute(
        self,
        run_id: str,
        tenant_id: str,
        run_status: str,
        agent_id: str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
        trace_id: str | None = None,
        is_synthetic: bool = False,
        synthetic_scenario_id: str | None = None,
        skip_events: bool = False,
    ) -> T:
        """Complete the run: every domain or none. Raises TransactionFailed, or CompletionConflict."""
        return self._ask(
            CompleteRun(
                run_id=run_id,
                tenant_id=tenant_id,
                run_status=run_status,
                agent_id=agent_id,
                error_code=error_code,
                error_message=error_message,
                trace_id=trace_id,
                is_synthetic=is_synthetic,
                synthetic_scenario_id=synthetic_scenario_id,
                skip_events=skip_events,
            )
        )
