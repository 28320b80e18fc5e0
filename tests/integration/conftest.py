"""What tests of execute, and of transactions with domains outside, share."""

from __future__ import annotations

import pytest

from tests.integration.desk import Desk
from tests.participants import World


@pytest.fixture
def world() -> World:
    """Systems outside to which nothing has been done yet."""
    return World()


@pytest.fixture
def unswept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sweeps in this test."""
    monkeypatch.setattr("actors.reconciler.SWEEP_S", 1e9)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stranded is looked for without waiting long, and a stop waits less for what does not end."""
    monkeypatch.setattr("actors.takeover.TICK_S", 0.02)
    monkeypatch.setattr("actors.coordinator.STOP_S", 0.3)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch, often: None) -> None:
    """A lease that is over soon: a Spine that was stopped in this process counts as living as long as it has one."""
    monkeypatch.setattr("actors.recovery.LEASE_S", 0.1)
    monkeypatch.setattr("actors.outbox.RELOAD_S", 0.05)


@pytest.fixture
async def desk(sqlite_url: str) -> Desk:
    return Desk(sqlite_url)
