"""A place that ends every process that comes to it: a transaction is not claimed again for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.governed import intact, journal, query
from tests.integration.stalled_process import STALLED_MOST
from tests.participants import acks, moves, steps, transactions

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tmp_path / "live"


def lives(url: str, live: Path, dies_in: str = "", status: str = "") -> str:
    """Let a process work or recover; what it said, or that it died."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.integration.stalled_process", url, str(live), status],
        env={**os.environ, "DIES_IN": dies_in},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if dies_in and done.returncode == 9:
        return "died"
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def claims(url: str) -> int:
    return len(journal(url, "tx.claimed"))


def test_a_domain_that_ends_every_process_is_given_up_and_what_was_done_before_it_is_undone(
    sqlite_url: str, live: Path
) -> None:
    """A LOCAL domain that kills its process: after so many deaths the next one aborts and gives the payment back."""
    assert lives(sqlite_url, live, "plan", "succeeded") == "died"
    assert live.exists()
    deaths = 1
    while lives(sqlite_url, live, "plan") == "died":
        deaths += 1
        assert deaths <= STALLED_MOST, "it is claimed again for ever"
    assert deaths == STALLED_MOST == claims(sqlite_url)
    assert not live.exists()
    assert transactions(sqlite_url) == ["ABORTED"]
    assert steps(sqlite_url) == {"pay": "ROLLED_BACK"}
    (aborting,) = journal(sqlite_url, "tx.aborting")
    assert (aborting["failed_domain"], aborting["code"]) == ("book", "STALLED")
    assert f"{STALLED_MOST} processes in a row ended" in aborting["error"]
    assert ("pay", "ROLLED_BACK") in acks(sqlite_url)
    intact(sqlite_url)


def test_a_rollback_outlives_fewer_deaths_than_that(sqlite_url: str, live: Path) -> None:
    """Processes that are killed while they undo count less than rollbacks that fail: the next one undoes it."""
    assert lives(sqlite_url, live, "rollback", "refused") == "died"
    for _ in range(STALLED_MOST - 2):
        assert lives(sqlite_url, live, "rollback") == "died"
    assert lives(sqlite_url, live) == ""
    assert not live.exists()
    assert transactions(sqlite_url) == ["ABORTED"]
    assert moves(sqlite_url)[-2:] == ["undone pay", "aborted"]
    intact(sqlite_url)


def test_a_rollback_that_ends_every_process_is_parked(sqlite_url: str, live: Path) -> None:
    """It waits for an operator, who sees why; what was done stands meanwhile."""
    assert lives(sqlite_url, live, "rollback", "refused") == "died"
    for _ in range(STALLED_MOST - 1):
        assert lives(sqlite_url, live, "rollback") == "died"
    assert lives(sqlite_url, live, "rollback") == ""
    assert live.exists()
    assert transactions(sqlite_url) == ["PARKED"]
    ((error,),) = query(sqlite_url, "SELECT error FROM steps WHERE state = 'PARKED'")
    assert f"{STALLED_MOST} processes in a row ended" in error
    intact(sqlite_url)
