"""Who restarts, whether at all, and after how long: OTP's rules as pure functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spine.kernel.restart import add_restart, backoff, restarts, wants_restart

CHILDREN = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=8, unique=True)


@given(CHILDREN, st.data())
def test_a_strategy_restarts_the_failed_child_and_whom_it_names(children: list[str], data: st.DataObject) -> None:
    failed = data.draw(st.sampled_from(children))
    assert restarts("one_for_one", children, failed) == [failed]
    rest = restarts("rest_for_one", children, failed)
    assert rest == children[children.index(failed) :]
    assert restarts("one_for_all", children, failed) == children


@given(CHILDREN, st.data())
def test_every_strategy_keeps_the_start_order(children: list[str], data: st.DataObject) -> None:
    failed = data.draw(st.sampled_from(children))
    for strategy in ("one_for_one", "rest_for_one", "one_for_all"):
        named = restarts(strategy, children, failed)
        assert failed in named
        assert named == [child for child in children if child in named]


def test_permanent_children_restart_always_transient_ones_after_a_crash_temporary_ones_never() -> None:
    table = {
        (kind, crashed): wants_restart(kind, crashed=crashed)
        for kind in ("permanent", "transient", "temporary")
        for crashed in (True, False)
    }
    assert table == {
        ("permanent", True): True,
        ("permanent", False): True,
        ("transient", True): True,
        ("transient", False): False,
        ("temporary", True): False,
        ("temporary", False): False,
    }


@given(
    st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=30),
    st.integers(0, 5),
    st.floats(0.1, 10, allow_nan=False),
)
def test_restarts_are_allowed_up_to_the_intensity_within_any_period(
    gaps: list[float], intensity: int, period_s: float
) -> None:
    """Against the definition: count the restarts, this one included, that are younger than the period."""
    history: list[float] = []
    moments: list[float] = []
    now = 0.0
    for gap in gaps:
        now += gap
        moments.append(now)
        history, allowed = add_restart(history, now, intensity=intensity, period_s=period_s)
        young = sum(1 for moment in moments if now - moment < period_s)
        assert allowed is (young <= intensity)
        assert len(history) == young


def test_an_intensity_of_none_allows_no_restart() -> None:
    _, allowed = add_restart([], 1.0, intensity=0, period_s=5)
    assert not allowed


@given(st.integers(1, 10_000), st.floats(0.001, 1), st.floats(1, 100), st.floats(0, 0.5))
def test_backoff_doubles_up_to_its_cap_and_never_overflows(
    attempt: int, first_s: float, most_s: float, jitter: float
) -> None:
    delay = backoff(attempt, first_s=first_s, most_s=most_s, jitter=jitter)
    assert 0 < delay <= most_s * (1 + jitter)
    assert delay >= min(first_s, most_s)
    following = backoff(attempt + 1, first_s=first_s, most_s=most_s, jitter=jitter)
    assert following >= delay
    if following < most_s:
        assert following == 2 * delay or delay * 2 > most_s


def test_the_first_restart_waits_the_first_backoff_and_the_next_ones_twice_as_long() -> None:
    delays = [backoff(attempt, first_s=0.01, most_s=0.05, jitter=0.0) for attempt in range(1, 6)]
    assert delays == [0.01, 0.02, 0.04, 0.05, 0.05]


@given(st.integers(1, 20), st.floats(0, 1))
def test_jitter_only_makes_a_wait_longer(attempt: int, jitter: float) -> None:
    plain = backoff(attempt, first_s=0.01, most_s=1.0, jitter=0.0)
    assert backoff(attempt, first_s=0.01, most_s=1.0, jitter=jitter) == plain * (1 + jitter)
