"""May this operation run? Decisions, governance states, rules, and the pure function that combines them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import translate
from typing import TYPE_CHECKING, Any, Literal

from spine.governance.params import id_problem
from spine.kernel.errors import ConfigurationError, describe

if TYPE_CHECKING:
    from spine.governance.operations import OperationContext

BYPASS_DEFAULT_S = 3600
BYPASS_MOST_S = 4 * 3600


@dataclass(frozen=True, slots=True)
class AuthorityDecision:
    """The verdict before an operation runs, made by ``allow``, ``deny``, ``allow_with_degraded_flag`` or ``error``."""

    allowed: bool
    degraded: bool
    reason: str
    code: str
    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.conditions != ():
            object.__setattr__(self, "conditions", tuple(dict.fromkeys(self.conditions)))

    @classmethod
    def allow(cls, reason: str = "allowed") -> AuthorityDecision:
        """The operation may run."""
        if reason == "allowed" and cls is AuthorityDecision:
            return ALLOW
        return cls(True, False, reason, "ALLOWED")

    @classmethod
    def deny(cls, reason: str, code: str = "DENIED") -> AuthorityDecision:
        """The operation may not run; ``code`` is what the caller sees as ``error_code``."""
        return cls(False, False, reason, code)

    @classmethod
    def allow_with_degraded_flag(cls, reason: str, conditions: Sequence[str] = ()) -> AuthorityDecision:
        """The operation may run and everything it leaves is flagged."""
        return cls(True, True, reason, "DEGRADED", tuple(conditions))

    @classmethod
    def error(cls, reason: str) -> AuthorityDecision:
        """The check itself failed: the operation runs, flagged, and is counted."""
        return cls(True, True, reason, "AUTHORITY_CHECK_ERROR")

    @property
    def rank(self) -> int:
        """Severity: deny 2, degraded 1, allow 0."""
        return 1 if self.allowed and self.degraded else 0 if self.allowed else 2

    @staticmethod
    def combine(*decisions: AuthorityDecision) -> AuthorityDecision:
        """The most severe decision (the first of equals) with the conditions of all; associative and idempotent."""
        if not decisions:
            return ALLOW
        worst = max(decisions, key=lambda decision: decision.rank)
        conditions = tuple(dict.fromkeys(c for decision in decisions for c in decision.conditions))
        return worst if conditions == worst.conditions else replace(worst, conditions=conditions)

    def with_condition(self, condition: str) -> AuthorityDecision:
        """This decision with one more condition."""
        return replace(self, conditions=(*self.conditions, condition))

    def to_dict(self) -> dict[str, Any]:
        """As recorded."""
        return {
            "allowed": self.allowed,
            "degraded": self.degraded,
            "reason": self.reason,
            "code": self.code,
            "conditions": list(self.conditions),
        }


ALLOW = AuthorityDecision(True, False, "allowed", "ALLOWED")


class GovernanceMode(StrEnum):
    """What the kill switch and its siblings are set to."""

    ACTIVE = "active"
    BYPASSED = "bypassed"
    DEGRADED = "degraded"
    HALTED = "halted"


@dataclass(frozen=True, slots=True)
class GovernanceState:
    """The switch every decision is made under; ``epoch`` counts its changes, ``*_at`` are unix microseconds.

    ``would_have_denied`` lists, after a bypass ended, what it let through against the rules.
    """

    mode: GovernanceMode = GovernanceMode.ACTIVE
    epoch: int = 1
    reason: str = ""
    actor: str = ""
    since_at: int = 0
    expires_at: int | None = None
    would_have_denied: tuple[dict[str, Any], ...] = ()

    @property
    def active(self) -> bool:
        """Whether decisions bind."""
        return self.mode is not GovernanceMode.BYPASSED

    def effective(self, now_at: int) -> GovernanceState:
        """The state that holds at ``now_at``: an expired bypass governs again before its restoration is journaled."""
        if self.mode is GovernanceMode.BYPASSED and self.expires_at is not None and now_at >= self.expires_at:
            return replace(self, mode=GovernanceMode.ACTIVE)
        return self

    def to_dict(self) -> dict[str, Any]:
        """As printed by the operator commands."""
        return {
            "state": self.mode.value,
            "epoch": self.epoch,
            "reason": self.reason,
            "actor": self.actor,
            "since_at": self.since_at,
            "expires_at": self.expires_at,
            "would_have_denied": list(self.would_have_denied),
        }


Effect = Literal["enforced", "bypassed", "failed_open"]
RuleMode = Literal["enforce", "warn", "shadow"]
OnError = Literal["deny", "allow"]
RuleFunction = Callable[["OperationContext"], AuthorityDecision]


@dataclass(frozen=True, slots=True)
class Rule:
    """A synchronous callable bound to the operations its pattern (``domain.*``, ``*``) matches.

    ``allowed`` is what is recorded when it allowed without a word of its own: by far the most frequent record.
    """

    pattern: str
    function: RuleFunction
    id: str
    version: str
    mode: RuleMode
    on_error: OnError
    allowed: Mapping[str, Any]

    @classmethod
    def bind(
        cls,
        pattern: str,
        function: RuleFunction,
        *,
        id: str | None = None,  # noqa: A002  fixed by the public signature
        version: str | None = None,
        mode: RuleMode = "enforce",
        on_error: OnError = "deny",
    ) -> Rule:
        """Check the declaration; raises ``TypeError`` or ``ConfigurationError`` naming what is wrong."""
        if not callable(function):
            raise TypeError(f"rule for {pattern!r} is {type(function).__name__}, not callable")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise TypeError(
                f"rule {getattr(function, '__name__', pattern)!r} is async: rules are synchronous callables"
            )
        if not isinstance(pattern, str) or not pattern:
            raise ConfigurationError(f"rule pattern {pattern!r} must be a non-empty string such as 'refunds.*'")
        if mode not in ("enforce", "warn", "shadow"):
            raise ConfigurationError(f"rule for {pattern!r}: mode {mode!r} must be enforce, warn or shadow")
        if on_error not in ("deny", "allow"):
            raise ConfigurationError(f"rule for {pattern!r}: on_error {on_error!r} must be deny or allow")
        name = id or str(getattr(function, "__name__", type(function).__name__))
        for label, value in (("id", name), ("version", version or "1"), ("pattern", pattern)):
            if problem := id_problem(f"rule {label}", value):
                raise ConfigurationError(f"rule for {pattern!r}: {problem}")
        allowed = {
            "id": name,
            "version": version or "1",
            "mode": mode,
            "outcome": "allow",
            "determined": True,
            "reason": ALLOW.reason,
            "code": ALLOW.code,
        }
        return cls(pattern, function, name, version or "1", mode, on_error, allowed)

    def matches(self, operation: str) -> bool:
        """Whether the rule is asked about this operation."""
        return re.match(translate(self.pattern), operation) is not None


@dataclass(slots=True)
class RuleOutcome:
    """What one rule said, what that counts for, and whether it determined the decision."""

    rule: Rule
    said: AuthorityDecision
    counts: AuthorityDecision | None
    raised: bool
    determined: bool = False


@dataclass(slots=True)
class Verdict:
    """A decision with how it came about."""

    decision: AuthorityDecision
    governance: GovernanceState
    outcomes: Sequence[RuleOutcome] = ()
    effect: Effect = "enforced"
    would_have: AuthorityDecision | None = None
    rule_errors: int = 0
    check_failed: bool = False


@dataclass(slots=True)
class Question:
    """The input of a check: the state, the rules asked, a fresh context for each, and whether a new run would begin."""

    governance: GovernanceState
    rules: Sequence[Rule]
    context: Callable[[], OperationContext]
    starts_run: bool


def check(question: Question) -> Verdict:
    """Ask the governance state, then every matching rule, and combine what they say."""
    state = question.governance
    mode = state.mode
    if mode is GovernanceMode.ACTIVE:
        standing = None
    else:
        standing = _standing(state, question.starts_run)
        if not standing.allowed:
            return Verdict(standing, state)
    outcomes = []
    ruled = ALLOW
    would_have: AuthorityDecision | None = None
    errors = 0
    failed_open = False
    for rule in question.rules:
        outcome = _ask(rule, question.context)
        outcomes.append(outcome)
        if outcome.raised:
            errors += 1
            failed_open = failed_open or (rule.on_error == "allow" and rule.mode != "shadow")
        if outcome.counts is None:
            if would_have is None and not outcome.said.allowed:
                would_have = outcome.said
        elif outcome.counts is not ALLOW:
            ruled = outcome.counts if ruled is ALLOW else AuthorityDecision.combine(ruled, outcome.counts)
    if standing is not None and mode is GovernanceMode.BYPASSED:
        # What a shadow rule would have done, it would not have done without the bypass either.
        return Verdict(standing, state, outcomes, "bypassed", None if ruled.allowed else ruled, errors)
    decision = ruled if standing is None else AuthorityDecision.combine(ruled, standing)
    _mark_determining(outcomes, decision.rank)
    effect: Effect = "failed_open" if failed_open and decision.allowed else "enforced"
    return Verdict(decision, state, outcomes, effect, would_have, errors)


def _mark_determining(outcomes: Sequence[RuleOutcome], rank: int) -> None:
    for outcome in outcomes:
        counts = outcome.counts
        outcome.determined = counts is not None and counts.rank == rank


def _standing(state: GovernanceState, starts_run: bool) -> AuthorityDecision:
    match state.mode:
        case GovernanceMode.HALTED:
            return AuthorityDecision.deny(f"governance is halted by {state.actor}: {state.reason}", code="HALTED")
        case GovernanceMode.DEGRADED if starts_run:
            return AuthorityDecision.deny(
                f"governance is degraded by {state.actor}: {state.reason}; new runs are refused",
                code="DEGRADED_NEW_RUN",
            )
        case GovernanceMode.DEGRADED:
            return AuthorityDecision.allow_with_degraded_flag(
                f"governance is degraded by {state.actor}: {state.reason}", ("governance_degraded",)
            )
        case GovernanceMode.BYPASSED:
            reason = f"governance is bypassed by {state.actor}: {state.reason}"
            return AuthorityDecision(True, False, reason, "BYPASSED", ("governance_bypassed",))
        case _:
            return ALLOW


def check_start(governance: GovernanceState, *, completion: bool = False) -> AuthorityDecision:
    """May a run start now? With ``completion``, how a run's completion is flagged: that is always accepted."""
    if governance.mode is GovernanceMode.ACTIVE:
        return ALLOW
    if not completion:
        return _standing(governance, starts_run=True)
    if governance.mode is GovernanceMode.BYPASSED:
        return _standing(governance, starts_run=False)
    return AuthorityDecision.allow_with_degraded_flag(
        f"completed while governance was {governance.mode.value} by {governance.actor}: {governance.reason}",
        (f"governance_{governance.mode.value}",),
    )


def _ask(rule: Rule, context: Callable[[], OperationContext]) -> RuleOutcome:
    try:
        said = rule.function(context())
        wrong = None if said is ALLOW else _wrong(said)
    except BaseException as error:  # noqa: BLE001  foreign code: its failure is a decision (RULE_ERROR)
        return _failed(rule, f"rule {rule.id!r} raised {describe(error)}")
    if wrong is not None:
        return _failed(rule, f"rule {rule.id!r} returned {wrong}")
    if rule.mode == "enforce":
        return RuleOutcome(rule, said, said, False)
    if rule.mode == "shadow":
        return RuleOutcome(rule, said, None, False)
    if said.allowed:
        return RuleOutcome(rule, said, said, False)
    return RuleOutcome(rule, said, AuthorityDecision.allow_with_degraded_flag(said.reason, (said.code,)), False)


def _wrong(said: object) -> str | None:
    """What a rule returned, if that is no decision; may raise what the foreign object raises."""
    if not isinstance(said, AuthorityDecision):
        if inspect.iscoroutine(said):
            said.close()
        return f"{type(said).__name__}, not an AuthorityDecision"
    whose = "an AuthorityDecision whose"
    for name in ("reason", "code"):
        if not isinstance(getattr(said, name), str):
            return f"{whose} {name} is {type(getattr(said, name)).__name__}, not text"
    if not isinstance(said.conditions, tuple):
        return f"{whose} conditions are {type(said.conditions).__name__}, not a tuple of texts"
    if not all(isinstance(condition, str) for condition in said.conditions):
        return f"{whose} conditions are not all text"
    if not isinstance(said.allowed, bool) or not isinstance(said.degraded, bool):
        return f"{whose} allowed and degraded are not both true or false"
    return None


def scrubbed(verdict: Verdict, scrub: Callable[[str], str]) -> Verdict:
    """The verdict without the secrets that rules wrote into their reasons."""

    def clean(said: AuthorityDecision) -> AuthorityDecision:
        return replace(
            said, reason=scrub(said.reason), code=scrub(said.code), conditions=tuple(map(scrub, said.conditions))
        )

    for outcome in verdict.outcomes:
        outcome.said = clean(outcome.said)
    verdict.decision = clean(verdict.decision)
    if verdict.would_have is not None:
        verdict.would_have = clean(verdict.would_have)
    return verdict


def _failed(rule: Rule, reason: str) -> RuleOutcome:
    said = AuthorityDecision.deny(reason[:2000], code="RULE_ERROR")
    if rule.mode == "shadow":
        return RuleOutcome(rule, said, None, True)
    if rule.on_error == "allow" or rule.mode == "warn":
        return RuleOutcome(rule, said, AuthorityDecision.allow_with_degraded_flag(said.reason, ("RULE_ERROR",)), True)
    return RuleOutcome(rule, said, said, True)


def flat(decision: AuthorityDecision, governance: GovernanceState) -> dict[str, Any]:
    """The four fields that every result, log event and record carries."""
    return {
        "governance_active": governance.active,
        "authority_degraded": decision.degraded,
        "authority_reason": decision.reason,
        "authority_code": decision.code,
    }
