"""How a completion ends: phases, results per domain and as a whole, and its errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from spine.kernel.errors import ConfigurationError, SpineError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def moment(at_us: int) -> datetime:
    """The aware UTC time of ``at_us`` unix microseconds, exactly."""
    return _EPOCH + timedelta(microseconds=at_us)


class TransactionPhase(StrEnum):
    """How far a completion came; the words that workers already compare with."""

    NOT_STARTED = "NOT_STARTED"
    INCIDENT_CREATED = "INCIDENT_CREATED"
    POLICY_EVALUATED = "POLICY_EVALUATED"
    TRACE_COMPLETED = "TRACE_COMPLETED"
    COMMITTED = "COMMITTED"
    EVENTS_PUBLISHED = "EVENTS_PUBLISHED"
    ROLLED_BACK = "ROLLED_BACK"
    FAILED = "FAILED"
    PARKED = "PARKED"


_REACHED_BY: Final = {
    "incidents": TransactionPhase.INCIDENT_CREATED,
    "policies": TransactionPhase.POLICY_EVALUATED,
    "traces": TransactionPhase.TRACE_COMPLETED,
}


def phase_reached(done: Iterable[str]) -> TransactionPhase:
    """The phase a completion stands in once the domains ``done`` (in their order) have done their part."""
    phase = TransactionPhase.NOT_STARTED
    for name in done:
        phase = _REACHED_BY.get(name, phase)
    return phase


@dataclass(slots=True)
class DomainResult:
    """What one domain delivered: its row's or effect's id, or why it did not.

    ``state`` and ``domain_class`` are the step's, as the transition table names them; ``code`` is a refusal's own.
    """

    domain: str
    action: str
    result_id: str | None = None
    success: bool = False
    error: str | None = None
    timestamp: datetime | None = None
    code: str | None = None
    state: str | None = None
    domain_class: str = "LOCAL"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``from_dict`` reads it back."""
        return {
            "domain": self.domain,
            "action": self.action,
            "result_id": self.result_id,
            "success": self.success,
            "error": self.error,
            "timestamp": None if self.timestamp is None else self.timestamp.isoformat(),
            "code": self.code,
            "state": self.state,
            "class": self.domain_class,
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> DomainResult:
        """The result that ``to_dict`` wrote. Raises KeyError when ``domain`` or ``action`` is absent."""
        at = body.get("timestamp")
        return cls(
            domain=body["domain"],
            action=body["action"],
            result_id=body.get("result_id"),
            success=bool(body.get("success")),
            error=body.get("error"),
            timestamp=None if at is None else datetime.fromisoformat(at),
            code=body.get("code"),
            state=body.get("state"),
            domain_class=body.get("class", "LOCAL"),
        )


@dataclass(slots=True)
class TransactionResult:
    """How a completion ended: per domain, in order, with the authority it ran under in ``metadata``.

    ``duration_ms`` is in whole milliseconds; ``events_published`` lists event types in their order.
    """

    run_id: str
    incident_result: DomainResult | None = None
    policy_result: DomainResult | None = None
    trace_result: DomainResult | None = None
    phase: TransactionPhase = TransactionPhase.NOT_STARTED
    events_published: list[str] = field(default_factory=list)
    duration_ms: int = 0
    transaction_id: str | None = None
    tenant_id: str | None = None
    run_status: str | None = None
    domains: tuple[DomainResult, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run_id: str,
        domains: Sequence[DomainResult],
        *,
        phase: TransactionPhase,
        transaction_id: str | None = None,
        tenant_id: str | None = None,
        run_status: str | None = None,
        events_published: Sequence[str] = (),
        duration_ms: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> TransactionResult:
        """A result whose three legacy fields are found among ``domains`` by name."""
        named = {result.domain: result for result in domains}
        return cls(
            run_id=run_id,
            incident_result=named.get("incidents"),
            policy_result=named.get("policies"),
            trace_result=named.get("traces"),
            phase=phase,
            events_published=list(events_published),
            duration_ms=duration_ms,
            transaction_id=transaction_id,
            tenant_id=tenant_id,
            run_status=run_status,
            domains=tuple(domains),
            metadata=dict(metadata or {}),
        )

    @property
    def is_complete(self) -> bool:
        """Whether everything was committed."""
        return self.phase in (TransactionPhase.COMMITTED, TransactionPhase.EVENTS_PUBLISHED)

    @property
    def all_domains_succeeded(self) -> bool:
        """Whether no domain reported anything but success."""
        legacy = (self.incident_result, self.policy_result, self.trace_result)
        return all(r.success for r in self.domains) and all(r is None or r.success for r in legacy)

    @property
    def degraded(self) -> bool:
        """Whether the completion was accepted under degraded authority."""
        return bool(self.metadata.get("authority_degraded", False))

    @property
    def flagged(self) -> bool:
        """Whether the completion was accepted while the authority was degraded or not governing."""
        return self.degraded or not self.metadata.get("governance_active", True)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, the predecessor's keys included; ``from_dict`` reads it back."""
        return {
            "run_id": self.run_id,
            "phase": self.phase.value,
            "is_complete": self.is_complete,
            "all_domains_succeeded": self.all_domains_succeeded,
            "incident": None if self.incident_result is None else self.incident_result.to_dict(),
            "policy": None if self.policy_result is None else self.policy_result.to_dict(),
            "trace": None if self.trace_result is None else self.trace_result.to_dict(),
            "events_published": list(self.events_published),
            "duration_ms": self.duration_ms,
            "transaction_id": self.transaction_id,
            "tenant_id": self.tenant_id,
            "run_status": self.run_status,
            "domains": [result.to_dict() for result in self.domains],
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> TransactionResult:
        """The result that ``to_dict`` wrote. Raises KeyError without ``run_id``, ValueError on an unknown phase."""

        def one(name: str) -> DomainResult | None:
            found = body.get(name)
            return None if found is None else DomainResult.from_dict(found)

        return cls(
            run_id=body["run_id"],
            incident_result=one("incident"),
            policy_result=one("policy"),
            trace_result=one("trace"),
            phase=TransactionPhase(body.get("phase", "NOT_STARTED")),
            events_published=list(body.get("events_published", ())),
            duration_ms=body.get("duration_ms", 0),
            transaction_id=body.get("transaction_id"),
            tenant_id=body.get("tenant_id"),
            run_status=body.get("run_status"),
            domains=tuple(DomainResult.from_dict(entry) for entry in body.get("domains", ())),
            metadata=dict(body.get("metadata", {})),
        )


@dataclass(slots=True)
class RollbackAction:
    """The undo of one domain's part, as an audit trail names it.

    ``rollback_fn`` exists for callers of the predecessor; Spine undoes by effect id and leaves it ``None``.
    """

    domain: str
    action: str
    rollback_fn: Callable[[], object] | None = None
    result_id: str | None = None
    executed: bool = False
    reason: str | None = None
    error: str | None = None


class TransactionFailed(SpineError):
    """A completion did not commit: nothing of it persists, or it is parked and says so.

    ``phase`` is how far it came, ``partial_results`` the ``TransactionResult.to_dict()`` at that moment, ``cause`` the
    error behind it, ``code`` and ``failed_domain`` what and where.
    """

    def __init__(
        self,
        message: str,
        phase: TransactionPhase,
        partial_results: Mapping[str, Any] | None = None,
        cause: BaseException | None = None,
        *,
        code: str | None = None,
        failed_domain: str | None = None,
        transaction_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.phase = phase
        self.partial_results: dict[str, Any] = dict(partial_results or {})
        self.cause = cause
        self.__cause__ = cause
        self.code = code
        self.failed_domain = failed_domain
        self.transaction_id = transaction_id

    @property
    def domains(self) -> tuple[DomainResult, ...]:
        """What each domain had reported, in order."""
        return tuple(DomainResult.from_dict(entry) for entry in self.partial_results.get("domains", ()))

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {"code": self.code, "failed_domain": self.failed_domain, "transaction_id": self.transaction_id}
        return (_rebuild, (type(self), self.message, self.phase, self.partial_results, _portable(self.cause), rest))


def _rebuild(
    kind: type[TransactionFailed],
    message: str,
    phase: TransactionPhase,
    partial_results: Mapping[str, Any],
    cause: BaseException | None,
    rest: Mapping[str, str | None],
) -> TransactionFailed:
    return kind(message, phase, partial_results, cause, **rest)


def _portable(cause: BaseException | None) -> BaseException | None:
    """``cause``, or its type and text where it does not survive pickling."""
    if cause is None:
        return None
    try:
        pickle.loads(pickle.dumps(cause))  # noqa: S301  reads back only what the line itself wrote
    except Exception:  # noqa: BLE001  a foreign error's own pickling may fail in any way
        return SpineError(f"{type(cause).__name__}: {cause}")
    return cause


class CompletionConflict(SpineError):
    """A completion with another payload already stands under the same run and completion key."""


class RollbackNotSupportedError(ConfigurationError):
    """An EXTERNAL domain cannot be undone, so a completion with it is refused before any effect."""
