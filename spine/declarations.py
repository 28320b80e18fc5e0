"""What an application declares before the start: its operations and the rules over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import TypeVar

from pydantic import BaseModel

from spine.governance.authority import OnError, Rule, RuleFunction, RuleMode
from spine.governance.operations import Durability, Handler, Operation, declare
from spine.kernel.errors import RegistrationError

H = TypeVar("H", bound=Handler)
F = TypeVar("F", bound=RuleFunction)


class Declarations:
    """Operations and rules; open until ``freeze``."""

    def __init__(self) -> None:
        self._operations: dict[str, Operation] = {}
        self._rules: list[Rule] = []
        self._frozen = False

    def operation(
        self,
        name: str,
        *,
        params: type[BaseModel] | None = None,
        timeout_s: float = 30,
        concurrency: int = 64,
        durability: Durability = "committed",
        idempotent: bool = False,
        audit_fields: Sequence[str] | None = None,
    ) -> Callable[[H], H]:
        """Register the decorated handler as ``domain.action``.

        Raises ``RuntimeError`` for a duplicate or after the start, ``TypeError`` for what is not callable.
        """

        if not isinstance(name, str):
            raise TypeError("@spine.operation needs a name: write @spine.operation('domain.action')")

        def register(handler: H) -> H:
            self._open_to(f"operation {name!r}")
            if name in self._operations:
                raise RegistrationError(f"operation {name!r} is registered already: give each operation one handler")
            self._operations[name] = declare(
                name,
                handler,
                params=params,
                timeout_s=timeout_s,
                concurrency=concurrency,
                durability=durability,
                idempotent=idempotent,
                audit_fields=audit_fields,
            )
            return handler

        return register

    def rule(
        self,
        pattern: str,
        *,
        id: str | None = None,  # noqa: A002  fixed by the public signature
        version: str | None = None,
        mode: RuleMode = "enforce",
        on_error: OnError = "deny",
    ) -> Callable[[F], F]:
        """Bind the decorated synchronous function to the operations that ``pattern`` matches."""

        if not isinstance(pattern, str):
            raise TypeError("@spine.rule needs a pattern: write @spine.rule('domain.*')")

        def bind(function: F) -> F:
            rule = Rule.bind(pattern, function, id=id, version=version, mode=mode, on_error=on_error)
            self._open_to(f"rule {rule.id!r}")
            if any(known.id == rule.id and known.pattern == rule.pattern for known in self._rules):
                raise RegistrationError(f"rule {rule.id!r} is bound to {pattern!r} already: give it another id")
            self._rules.append(rule)
            return function

        return bind

    def _open_to(self, what: str) -> None:
        if self._frozen:
            raise RegistrationError(f"{what} comes after the start: operations and rules are frozen, declare it before")

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of the registered operations, sorted."""
        return tuple(sorted(self._operations))

    @property
    def operation_count(self) -> int:
        """How many operations are registered."""
        return len(self._operations)

    @property
    def frozen(self) -> bool:
        """Whether the registration is closed."""
        return self._frozen

    def has_operation(self, name: str) -> bool:
        """Whether an operation of this name is registered."""
        return name in self._operations

    def _freeze(self) -> None:
        self._frozen = True

    def _rules_by_operation(self) -> dict[str, tuple[Rule, ...]]:
        return {name: tuple(rule for rule in self._rules if rule.matches(name)) for name in self._operations}

    def _idle_rules(self) -> list[str]:
        """The rules that no operation will ever be asked about: most likely a pattern is misspelt."""
        return [rule.id for rule in self._rules if not any(rule.matches(name) for name in self._operations)]

    def _code_names(self, others: Sequence[object]) -> dict[CodeType, str]:
        """Which code belongs to which handler, rule, domain or publisher, for naming what holds the event loop."""
        named: list[tuple[object, str]] = [(o.handler, f"operation {o.name}") for o in self._operations.values()]
        named += [(rule.function, f"rule {rule.id}") for rule in self._rules]
        named += [
            (getattr(other, method).__func__, f"{type(other).__name__}.{method}")
            for other in others
            for method in ("plan", "describe", "forward", "rollback", "status", "post", "publish")
            if hasattr(getattr(other, method, None), "__func__")
        ]
        found = {}
        for function, name in named:
            code = getattr(inspect.unwrap(function), "__code__", None)  # type: ignore[arg-type]
            code = code or getattr(type(function).__dict__.get("__call__"), "__code__", None)
            if isinstance(code, CodeType):
                found[code] = name
        return found
