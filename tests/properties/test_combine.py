"""The algebra of authority decisions: how several verdicts become one."""

from __future__ import annotations

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from spine import AuthorityDecision

words = st.text(max_size=8)
conditions = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=4)
decisions = st.one_of(
    words.map(AuthorityDecision.allow),
    st.builds(AuthorityDecision.deny, words, words),
    st.builds(AuthorityDecision.allow_with_degraded_flag, words, conditions),
    words.map(AuthorityDecision.error),
    st.builds(
        AuthorityDecision,
        allowed=st.booleans(),
        degraded=st.booleans(),
        reason=words,
        code=words,
        conditions=conditions.map(tuple),
    ),
)
combine = AuthorityDecision.combine


def severity(decision: AuthorityDecision) -> int:
    """Deny over degraded over allow, said without the code under test."""
    if not decision.allowed:
        return 2
    return 1 if decision.degraded else 0


@given(st.lists(decisions, min_size=1, max_size=6))
def test_the_most_severe_decision_wins_and_the_first_of_equals(several: list[AuthorityDecision]) -> None:
    """deny > degraded > allow; the verdict, reason and code are those of the first decision of the highest severity."""
    together = combine(*several)
    worst = max(map(severity, several))
    first = next(decision for decision in several if severity(decision) == worst)
    assert severity(together) == worst
    assert (together.allowed, together.degraded, together.reason, together.code) == (
        first.allowed,
        first.degraded,
        first.reason,
        first.code,
    )


@given(decisions, decisions, decisions)
def test_it_does_not_matter_how_decisions_are_grouped(
    a: AuthorityDecision, b: AuthorityDecision, c: AuthorityDecision
) -> None:
    """Combining is associative, for the whole decision: verdict, reason, code and conditions."""
    assert combine(combine(a, b), c) == combine(a, combine(b, c)) == combine(a, b, c)


@given(st.lists(decisions, min_size=1, max_size=6))
def test_combining_one_by_one_is_combining_at_once(several: list[AuthorityDecision]) -> None:
    """A fold over any number of decisions gives what one call gives."""
    assert reduce(combine, several) == combine(*several)


@given(decisions)
def test_a_decision_with_itself_is_itself(a: AuthorityDecision) -> None:
    """Combining is idempotent."""
    assert combine(a) == combine(a, a) == combine(a, a, a) == a


@given(decisions, decisions)
def test_the_order_changes_no_verdict_and_no_set_of_conditions(a: AuthorityDecision, b: AuthorityDecision) -> None:
    """Only which of two equals gives its reason depends on their order."""
    one, other = combine(a, b), combine(b, a)
    assert severity(one) == severity(other)
    assert set(one.conditions) == set(other.conditions)


@given(st.lists(decisions, max_size=5), decisions)
def test_one_more_decision_never_makes_the_verdict_milder(
    several: list[AuthorityDecision], one_more: AuthorityDecision
) -> None:
    """Whoever joins can only restrict."""
    assert severity(combine(*several, one_more)) >= severity(combine(*several))


@given(st.lists(decisions, max_size=6))
def test_every_condition_is_kept_once_in_the_order_it_was_first_set(several: list[AuthorityDecision]) -> None:
    """No condition is lost, none is doubled."""
    expected = tuple(dict.fromkeys(c for decision in several for c in decision.conditions))
    assert combine(*several).conditions == expected


def test_nothing_to_combine_allows() -> None:
    """Without any decision there is nothing against it."""
    assert combine() == AuthorityDecision.allow()
