"""The blocked-loop witness names what holds the event loop."""

from __future__ import annotations

import asyncio
import threading
import time

import anyio
import pytest
from structlog.testing import capture_logs

from spine.kernel.tracing import Tracer
from spine.kernel.watchdog import Watchdog
from tests.unit.kernel_rig import until

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(45, method="thread")]


def hold_the_loop(release: threading.Event) -> None:
    release.wait(10)


def rule_that_waits(release: threading.Event) -> None:
    hold_the_loop(release)


def watched(limit_s: float = 0.05) -> Watchdog:
    names = {rule_that_waits.__code__: "rule rule_that_waits"}
    return Watchdog(asyncio.get_running_loop(), Tracer("b" * 16), names, limit_s=limit_s)


async def test_what_holds_the_loop_is_named_with_its_stack_and_the_seconds() -> None:
    dog, release = watched(), threading.Event()
    with capture_logs() as logs:
        dog.start()
        try:
            # The loop is let go as soon as the watchdog has spoken: nothing depends on how fast this machine is.
            threading.Thread(target=lambda: (wait_for(lambda: logs), release.set())).start()
            rule_that_waits(release)
            await until(lambda: dog.reports)
        finally:
            dog.stop()
    (report,) = dog.reports
    assert report.culprit == "rule rule_that_waits"
    assert "hold_the_loop" in report.stack
    assert report.seconds >= 0.05
    (event,) = [line for line in logs if line["event"] == "spine.loop.blocked"]
    assert event["culprit"] == report.culprit
    assert event["log_level"] == "error"


async def test_code_that_nobody_registered_is_still_shown_by_its_stack() -> None:
    dog, release = watched(), threading.Event()
    with capture_logs() as logs:
        dog.start()
        try:
            threading.Thread(target=lambda: (wait_for(lambda: logs), release.set())).start()
            hold_the_loop(release)
            await until(lambda: dog.reports)
        finally:
            dog.stop()
    assert dog.reports[0].culprit == "unknown"
    assert "hold_the_loop" in dog.reports[0].stack


async def test_a_loop_that_turns_is_not_reported() -> None:
    dog = watched(limit_s=5)
    with capture_logs() as logs:
        dog.start()
        try:
            for _ in range(40):
                await anyio.sleep(0.01)
        finally:
            dog.stop()
    assert list(dog.reports) == []
    assert logs == []


async def test_the_watch_ends_with_its_spine() -> None:
    dog = watched()
    dog.start()
    dog.stop()
    await until(lambda: not dog._thread.is_alive())


def wait_for(condition: object, seconds: float = 8) -> None:
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:  # type: ignore[operator]
        time.sleep(0.005)
