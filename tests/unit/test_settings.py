"""What may be tuned, and what is refused because with it something would wait for ever."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spine.kernel.errors import ConfigurationError
from spine.settings import Retry, Settings


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("attempts", (0, -1, 101, 10**9, True, 2.0, "3", None), "an integer from 1 to 100"),
        ("first_s", (-0.1, 3600.1, math.inf, math.nan, True, "1", None), "a number of seconds from 0 to 3600"),
        ("most_s", (-1, 3601, math.inf, math.nan, False, "1", None), "a number of seconds from 0 to 3600"),
    ],
)
def test_a_retry_that_would_go_on_for_ever_is_refused_by_field_and_value(
    field: str, values: tuple[Any, ...], allowed: str
) -> None:
    """A rollback is parked after its last attempt: one that never comes would hide it."""
    for value in values:
        with pytest.raises(ConfigurationError) as told:
            Retry(**{field: value})
        assert str(told.value) == f"retry: {field} {value!r} must be {allowed}"


def test_the_bounds_themselves_are_taken() -> None:
    assert Retry(attempts=1, first_s=0, most_s=0) == Retry(1, 0.0, 0.0)
    assert Retry(attempts=100, first_s=3600, most_s=3600.0).attempts == 100


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("credits", (0, -1, 10**9, True, 1.0, "1", None), "an integer from 1 to 1000000"),
        *(
            (
                field,
                (0, -1, 86401, math.inf, math.nan, True, "1", None),
                "a number of seconds of more than 0 and at most 86400",
            )
            for field in ("drain_s", "stop_s", "blocked_s")
        ),
    ],
)
def test_settings_under_which_something_would_wait_for_ever_are_refused_by_field_and_value(
    field: str, values: tuple[Any, ...], allowed: str
) -> None:
    """A stop without an end, a queue without a bound: named when they are set."""
    for value in values:
        with pytest.raises(ConfigurationError) as told:
            Settings(**{field: value})
        assert str(told.value) == f"settings: {field} {value!r} must be {allowed}"
