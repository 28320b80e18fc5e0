"""Domains outside the journal's database: what they are asked to do, to undo, and to do after the commit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, Protocol, TypeGuard, runtime_checkable

from spine.governance.transactions import DomainClass
from spine.kernel.errors import ConfigurationError

TIMEOUT_S: Final = 10.0
ATTEMPTS: Final = 3
ATTEMPTS_MOST: Final = 100
TIMEOUT_MOST_S: Final = 3600.0
# How long a cancelled call may take to end before it is left behind, in seconds.
CANCEL_GRACE_S: Final = 1.0
APPLIED: Final = "applied"
ABSENT: Final = "absent"
TOMBSTONED: Final = "tombstoned"
STATUSES: Final = (APPLIED, ABSENT, TOMBSTONED)


@dataclass(frozen=True, slots=True)
class Effect:
    """What a domain outside is to do for one transaction, or to undo.

    ``id`` names it: the same at every attempt, by whatever process, so that repeats are one. ``epoch`` is the fencing
    token of who drives the transaction, ``attempt`` counts from 1, ``deadline`` is in monotonic seconds of the Spine's
    clock, ``descriptor`` what is needed to do and to undo it, as recorded before it was first sent.
    """

    id: str
    tx_id: str
    run_id: str
    tenant_id: str
    epoch: int
    attempt: int
    deadline: float
    descriptor: Mapping[str, Any]


@runtime_checkable
class External(Protocol):
    """A participant that acts on another system before the commit and can be undone.

    ``forward`` is idempotent per effect id; ``rollback`` too, tolerates an effect that was never applied, and leaves a
    tombstone that refuses a later ``forward``. Raising ``Refused`` is a business no; any other error, and no answer
    within ``timeout_s`` seconds, is tried again, ``attempts`` times in all, and then undone.

    Optional: ``async status(effect)`` gives ``"applied"``, ``"absent"`` or ``"tombstoned"``; ``describe(run)`` the
    effect's descriptor (else the facts of the completion); ``action`` names what is acknowledged;
    ``refuse_when_parked`` (default false) refuses new completions while a rollback of this domain is parked.
    """

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str]: ...

    @property
    def timeout_s(self) -> float: ...

    @property
    def attempts(self) -> int: ...

    async def forward(self, effect: Effect) -> Mapping[str, Any] | None: ...

    async def rollback(self, effect: Effect) -> None: ...


@runtime_checkable
class Post(Protocol):
    """A participant that cannot be undone and therefore acts after the commit, from the outbox, until it succeeds.

    ``post`` is called at least once, with the same effect id each time; ``describe(run)`` as for ``External``.
    """

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str]: ...

    async def post(self, effect: Effect) -> None: ...


def external_class(domain: object, label: str, timeout_s: object, attempts: object) -> DomainClass | None:
    """EXTERNAL or POST, ``None`` for neither. Raises ConfigurationError naming what is wrong with it."""
    methods = [name for name in ("plan", "forward", "post") if callable(getattr(domain, name, None))]
    if len(methods) > 1:
        raise ConfigurationError(
            f"{label} has {' and '.join(f'{name}()' for name in methods)}: a domain takes part in one way; split it"
        )
    if methods not in (["forward"], ["post"]):
        return None
    for name in ("forward", "rollback", "status", "post"):
        method = getattr(domain, name, None)
        if method is not None and not inspect.iscoroutinefunction(method):
            raise ConfigurationError(f"{label}: {name}(effect) must be `async def`: it waits for another system")
    if inspect.iscoroutinefunction(getattr(domain, "describe", None)):
        raise ConfigurationError(
            f"{label}: describe(run) is async, but it is called without waiting: make it a plain def"
        )
    if not _number(timeout_s) or not 0 < timeout_s <= TIMEOUT_MOST_S:
        raise ConfigurationError(
            f"{label}: timeout_s {timeout_s!r} must be more than 0 and at most {TIMEOUT_MOST_S:g} seconds"
        )
    if not isinstance(attempts, int) or isinstance(attempts, bool) or not 1 <= attempts <= ATTEMPTS_MOST:
        raise ConfigurationError(f"{label}: attempts {attempts!r} must be an integer from 1 to {ATTEMPTS_MOST}")
    return DomainClass.EXTERNAL if methods == ["forward"] else DomainClass.POST


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def timeout_of(domain: object) -> float:
    """How long one call of the domain may take, in seconds."""
    seconds: float = getattr(domain, "timeout_s", TIMEOUT_S)
    return seconds


def attempts_of(domain: object) -> int:
    """How often the domain's ``forward`` is tried in all."""
    attempts: int = getattr(domain, "attempts", ATTEMPTS)
    return attempts


def reversible(domain: object) -> bool:
    """Whether the domain can be undone."""
    return callable(getattr(domain, "rollback", None))
