"""What a domain is asked and may answer: the facts of a run, a business no, and what a LOCAL one looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from spine.governance.units import Write
from spine.kernel.errors import SpineError, describe
from spine.kernel.ids import named


class Refused(SpineError):
    """A domain's business no: the whole completion is rolled back, with ``code`` and ``reason`` in the record."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        # A number or None given as code or reason must not fail later, where it is recorded.
        self.code = str(code)
        self.reason = str(reason)

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return (type(self), (self.code, self.reason))


def said_by(refusal: Refused) -> tuple[str, str]:
    """Code and reason of a refusal, even of a subclass of the user's that does not set them or cannot give them."""
    try:
        code, reason = getattr(refusal, "code", None), getattr(refusal, "reason", None)
        return str(code or "REFUSED"), str(reason or describe(refusal))
    except BaseException:  # noqa: BLE001  foreign code, like the domain that raised it: a refusal it is all the same
        return "REFUSED", describe(refusal)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a domain may know of the completion it takes part in.

    ``completed_at`` is in unix microseconds; ``effect_id`` is the id a domain gives to what it writes: the same each
    time the same transaction is planned. The counts are of the run's operations as recorded; ``results`` holds what the
    EXTERNAL domains before this one returned, by name.
    """

    run_id: str
    tenant_id: str
    run_status: str
    tx_id: str
    completed_at: int
    effect_id: str = ""
    agent_id: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    trace_id: str | None = None
    is_synthetic: bool = False
    synthetic_scenario_id: str | None = None
    completion_key: str = ""
    operations: int = 0
    operations_denied: int = 0
    operations_failed: int = 0
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def seen_by(self, domain: str) -> RunFacts:
        """The same facts with the ``effect_id`` of ``domain``. Raises ValueError when ``tx_id`` is not a UUID."""
        return replace(self, effect_id=effect_id(self.tx_id, domain))

    def descriptor(self) -> dict[str, Any]:
        """What an effect is described by when its domain does not say it better."""
        return {
            name: getattr(self, name)
            for name in (
                "run_status", "agent_id", "error_code", "error_message", "trace_id", "is_synthetic",
                "synthetic_scenario_id", "completion_key", "completed_at", "operations", "operations_denied",
                "operations_failed",
            )
        }  # fmt: skip


def effect_id(tx_id: str, domain: str) -> str:
    """The id of what ``domain`` does in transaction ``tx_id``. Raises ValueError when ``tx_id`` is not a UUID."""
    return named(tx_id, [domain])[0]


@runtime_checkable
class Local(Protocol):
    """A participant whose writes join the completion's own commit.

    ``plan`` returns the writes; it may raise ``Refused``. It is called in the coordinator's task, so it must not block.
    An ``action`` attribute names what is acknowledged (default ``complete_run``).
    """

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str]: ...

    def plan(self, run: RunFacts) -> Sequence[Write]: ...
