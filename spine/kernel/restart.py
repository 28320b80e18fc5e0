"""The supervision policy as pure functions: who restarts, whether at all, and after how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Strategy = Literal["one_for_one", "rest_for_one", "one_for_all"]
RestartType = Literal["permanent", "transient", "temporary"]


def restarts(strategy: Strategy, children: Sequence[str], failed: str) -> list[str]:
    """Which children restart when ``failed`` ends, in start order (OTP's supervisor strategies)."""
    if strategy == "one_for_one":
        return [failed]
    if strategy == "rest_for_one":
        return list(children[children.index(failed) :])
    return list(children)


def wants_restart(restart: RestartType, *, crashed: bool) -> bool:
    """Whether a child that ended is to run again: permanent always, transient after a crash, temporary never."""
    return restart == "permanent" or (restart == "transient" and crashed)


def add_restart(history: Sequence[float], now: float, *, intensity: int, period_s: float) -> tuple[list[float], bool]:
    """The restarts of the last ``period_s`` seconds with this one, and whether they are still allowed.

    More than ``intensity`` (>= 0) of them within the period are not (OTP's ``add_restart``).
    """
    recent = [moment for moment in history if now - moment < period_s]
    recent.append(now)
    return recent, len(recent) <= intensity


def backoff(attempt: int, *, first_s: float, most_s: float, jitter: float) -> float:
    """Seconds to wait before restart ``attempt`` (from 1): doubled each time, capped, scaled by 1 + ``jitter``."""
    return min(most_s, first_s * 2.0 ** min(attempt - 1, 30)) * (1.0 + jitter)
