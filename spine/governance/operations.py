"""Operations: how they are declared, what their handlers see, what they answer, and the requests about them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from spine.governance.authority import AuthorityDecision, GovernanceMode, GovernanceState, flat
from spine.governance.params import Params
from spine.kernel.errors import ConfigurationError
from spine.kernel.messages import Request

Durability = Literal["committed", "buffered"]
Handler = Callable[["OperationContext"], Any]
Nested = Callable[[str, Mapping[str, Any] | None], Awaitable["OperationResult"]]
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)+")


@dataclass(slots=True)
class OperationResult:
    """How an operation ended; every governed ending is one of these, never an exception; nobody changes it.

    ``durable`` tells whether the record was committed before this was returned; ``metadata`` holds the decision's
    four authority fields.
    """

    success: bool
    data: Mapping[str, Any] | None = None
    error: str | None = None
    error_code: str | None = None
    operation: str = ""
    duration_ms: float = 0.0
    durable: bool = False
    decision: AuthorityDecision | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def ok(cls, data: Mapping[str, Any] | None = None) -> OperationResult:
        """A handler's success."""
        return cls(True, data)

    @classmethod
    def fail(cls, error: str, error_code: str = "FAILED") -> OperationResult:
        """A handler's own failure, with its own code."""
        return cls(False, None, error, error_code)


def ungoverned(operation: str, error: str, code: str, state: GovernanceState) -> OperationResult:
    """The result of a call that never reached the authority, with the four fields all the same."""
    decision = AuthorityDecision.deny(error, code)
    return OperationResult(False, None, error, code, operation, decision=decision, metadata=flat(decision, state))


class OperationContext:
    """What a rule and a handler see of the call.

    ``deadline`` is in seconds of the Spine's monotonic clock; ``attempt`` counts from 1 and grows when an interrupted
    idempotent operation runs again.
    """

    __slots__ = (
        "_nested",
        "attempt",
        "deadline",
        "idempotency_key",
        "model",
        "operation",
        "params",
        "run_id",
        "tenant_id",
    )

    def __init__(
        self,
        *,
        operation: str,
        tenant_id: str,
        run_id: str | None,
        params: Params,
        model: Any = None,
        deadline: float = 0.0,
        idempotency_key: str | None = None,
        attempt: int = 1,
        nested: Nested | None = None,
    ) -> None:
        self.operation = operation
        self.tenant_id = tenant_id
        self.run_id = run_id
        self.params = params
        self.model = model
        self.deadline = deadline
        self.idempotency_key = idempotency_key
        self.attempt = attempt
        self._nested = nested

    def execute(self, operation: str, params: Mapping[str, Any] | None = None) -> Awaitable[OperationResult]:
        """Run another operation in the same run, decided and recorded like any other, in the time that is left.

        Raises ``ConfigurationError`` when called by a rule (rules only decide), by a synchronous handler in its own
        thread (``anyio.from_thread.run`` leads out of it), or, when awaited, after the handler's end.
        """
        if self._nested is None:
            raise ConfigurationError(f"a rule asked about {self.operation!r} called execute: only handlers can")
        return self._nested(operation, params)


@dataclass(frozen=True, slots=True)
class Operation:
    """A registered handler; ``timeout_s`` in seconds (> 0), ``concurrency`` (>= 1) calls of it run at a time.

    A handler that is not ``is_async`` runs in a worker thread.
    """

    name: str
    handler: Handler
    params: type[BaseModel] | None = None
    timeout_s: float = 30
    concurrency: int = 64
    durability: Durability = "committed"
    idempotent: bool = False
    audit_fields: tuple[str, ...] | None = None

    is_async: bool = True


def declare(
    name: str,
    handler: Handler,
    *,
    params: type[BaseModel] | None = None,
    timeout_s: float = 30,
    concurrency: int = 64,
    durability: Durability = "committed",
    idempotent: bool = False,
    audit_fields: Sequence[str] | None = None,
) -> Operation:
    """Check a declaration; raises ``TypeError`` or ``ConfigurationError`` naming the operation and the field."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 200:
        raise ConfigurationError(f"operation name {name!r} must be domain.action of letters, digits, - and _")
    if not callable(handler):
        raise TypeError(f"the handler of operation {name!r} is {type(handler).__name__}, not callable")
    if params is not None and not (isinstance(params, type) and issubclass(params, BaseModel)):
        raise TypeError(f"operation {name!r}: params must be a pydantic model class, not {params!r}")
    if not _positive(timeout_s):
        raise ConfigurationError(f"operation {name!r}: timeout_s {timeout_s!r} must be a positive number of seconds")
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise ConfigurationError(f"operation {name!r}: concurrency {concurrency!r} must be an integer of at least 1")
    if durability not in ("committed", "buffered"):
        raise ConfigurationError(f"operation {name!r}: durability {durability!r} must be committed or buffered")
    if isinstance(audit_fields, str):
        raise ConfigurationError(f"operation {name!r}: audit_fields must be a sequence of names, not one text")
    fields = None if audit_fields is None else tuple(audit_fields)
    return Operation(name, handler, params, timeout_s, concurrency, durability, idempotent, fields, _is_async(handler))


def _is_async(handler: Handler) -> bool:
    call = type(handler).__dict__.get("__call__")
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)


def _positive(seconds: object) -> bool:
    return isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < 1e9


def timeout_problem(value: object) -> str | None:
    """Why ``value`` cannot be a timeout in seconds, or ``None``."""
    return None if _positive(value) else f"timeout_s {value!r} must be a positive number of seconds"


@dataclass(slots=True)
class Execute(Request[OperationResult]):
    """Run an operation. ``parent`` is the decision id of the operation that nests this call."""

    operation: str
    tenant_id: str
    run_id: str | None = None
    params: Any = None
    idempotency_key: str | None = None
    timeout_s: float = 30
    parent: str | None = None


@dataclass(slots=True)
class StartRun(Request[AuthorityDecision]):
    """Begin a run; ``expectations`` are (domain, action, deadline in seconds).

    With ``block_unmet`` the run commits only when everything promised is delivered.
    """

    run_id: str
    tenant_id: str
    agent_id: str | None = None
    expectations: tuple[tuple[str, str, float], ...] = ()
    block_unmet: bool = False


@dataclass(slots=True)
class SwitchGovernance(Request[GovernanceState]):
    """Set the governance state; ``for_s`` seconds for a bypass, else ``None``."""

    mode: GovernanceMode
    reason: str
    actor: str
    for_s: float | None = None


@dataclass(slots=True)
class RegistryStatus(Request[dict[str, Any]]):
    """What the registry holds now."""


@dataclass(slots=True)
class Ping(Request[None]):
    """Answered as soon as the registry takes it: tells that the way is open."""
