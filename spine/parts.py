"""Who takes part in completions: each participant as it was declared, in the order in which they are asked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from spine.built_in import BUILT_INS, BuiltIn
from spine.domains import Local
from spine.effects import ATTEMPTS, TIMEOUT_S, External, Post, attempts_of, external_class, timeout_of
from spine.governance.contract import Expectation
from spine.governance.params import id_problem
from spine.governance.transactions import DomainClass, plan_order
from spine.kernel.errors import ConfigurationError

DEFAULT_ACTION: Final = "complete_run"
# What acknowledges for the run itself, and what stands for its contract where a domain would be named.
RESERVED: Final = ("orchestrator", "contract")


Participant = BuiltIn | Local | External | Post


@dataclass(frozen=True, slots=True)
class Part:
    """A participant as it was declared: what its domain says of itself is read once, whatever it says later.

    ``timeout_s`` bounds one call of a domain outside, in seconds; its ``forward`` is tried ``attempts`` times in all.
    """

    name: str
    cls: DomainClass
    action: str
    after: tuple[str, ...]
    domain: Participant
    timeout_s: float = TIMEOUT_S
    attempts: int = ATTEMPTS
    refuse_when_parked: bool = False

    @property
    def promise(self) -> Expectation:
        """What a run promises of it: a POST domain may keep it after the run is finalised."""
        return Expectation(self.name, self.action, after_commit=self.cls is DomainClass.POST)


def part_of(domain: object) -> Part:
    """The part that ``domain`` declares. Raises ConfigurationError naming it when it cannot take part."""
    name, action = getattr(domain, "name", None), getattr(domain, "action", DEFAULT_ACTION)
    after = getattr(domain, "after", None)
    label = f"domain {name!r}" if isinstance(name, str) else f"domain {domain!r}"
    if not isinstance(name, str) or not name.strip():
        raise ConfigurationError(f"{label} has no name: give it a non-empty `name`")
    for field_name, value in (("name", name), ("action", action)):
        if problem := id_problem(field_name, value):
            raise ConfigurationError(f"{label}: {problem}")
    if name in RESERVED:
        raise ConfigurationError(f"{label}: the name is Spine's own; take another one than {', '.join(RESERVED)}")
    # An iterator is empty after one look, and a set has another order in each process.
    if not isinstance(after, (tuple, list)) or not all(isinstance(other, str) for other in after):
        raise ConfigurationError(
            f"{label}: `after` must be a tuple or list of domain names, () for none; found {after!r}"
        )
    if isinstance(domain, type):
        raise ConfigurationError(f"{label} is the class {domain.__qualname__}: pass an instance of it")
    timeout_s, attempts = timeout_of(domain), attempts_of(domain)
    return Part(
        name,
        _class_of(domain, label, timeout_s, attempts),
        action,
        tuple(after),
        cast(Participant, domain),
        timeout_s,
        attempts,
        bool(getattr(domain, "refuse_when_parked", False)),
    )


def _class_of(domain: object, label: str, timeout_s: object, attempts: object) -> DomainClass:
    """How ``domain`` takes part. Raises ConfigurationError when it cannot."""
    if inspect.iscoroutinefunction(getattr(domain, "plan", None)):
        raise ConfigurationError(
            f"{label}: plan(run) is async, but a plan is made without waiting: make it a plain def"
        )
    outside = external_class(domain, label, timeout_s, attempts)
    if outside is not None:
        return outside
    if isinstance(domain, BuiltIn) or callable(getattr(domain, "plan", None)):
        return DomainClass.LOCAL
    raise ConfigurationError(
        f"{label} ({type(domain).__name__}) cannot take part in a completion: it has neither plan(run) that returns "
        "writes (LOCAL), nor async forward(effect) and rollback(effect) (EXTERNAL), nor async post(effect) (POST)"
    )


def participants(domains: Sequence[object]) -> tuple[Part, ...]:
    """The built-in domains and ``domains`` in the order in which they take part.

    Raises ConfigurationError naming a domain that cannot take part, is declared twice, or waits in a circle.
    """
    return plan_order([part_of(domain) for domain in (*BUILT_INS, *domains)])
