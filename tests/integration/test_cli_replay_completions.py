"""``spine replay`` tells of the completions that the journal does not hold, and of no other."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import recording, run, told

APP = """
import asyncio, os
from spine import Refused, Spine
from spine.settings import Retry, Settings

class Payments:
    name, after, timeout_s, attempts, refuse_when_parked = "payments", (), 1, 1, True
    async def forward(self, effect):
        if effect.run_id == "run-0001":
            if os.environ["SAYS"] == "nothing":
                await asyncio.Event().wait()
            raise Refused(os.environ["SAYS"], "the customer has gone")
    async def rollback(self, effect):
        if "STUCK" in os.environ:
            raise ConnectionError("the bank is closed")

class Mail:
    name, after = "mail", ()
    async def forward(self, effect):
        pass

spine = Spine(domains=[Payments()], settings=Settings(retry=Retry(1)))
mailing = Spine(domains=[Mail()])
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Where an application lies whose payment fails for one run, as SAYS tells."""
    (tmp_path / "shop.py").write_text(textwrap.dedent(APP))
    return tmp_path


def replay(file: Path, app: str = "shop:spine", **env: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = run("replay", file, "--app", app, "--db", "shop.db", "--json", **{"SAYS": "NO_FUNDS", **env})
    totals = json.loads(done.stdout)
    del totals["seconds"]
    return done, totals


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command itself tells, without the log of its Spine."""
    return [line for line in done.stderr.splitlines() if line.startswith("spine: ")]


@pytest.mark.parametrize("says", ["nothing", "INVALID_PARAMS", "INTERRUPTED", "JOURNAL_UNAVAILABLE", "CANCELLED"])
def test_a_completion_that_a_domain_ended_is_recorded_whatever_the_domain_calls_it(shop: Path, says: str) -> None:
    """A domain's own code, or its silence, means what the domain means by it: rolled back, once, and nothing to say."""
    file = recording(shop / "day.jsonl")
    done, totals = replay(file, SAYS=says)
    assert (done.returncode, said(done)) == (0, [])
    assert (totals["committed"], totals["rolled_back"], totals["rejected_lines"]) == (5, 1, 0)
    again, after = replay(file, SAYS=says)
    assert (again.returncode, said(again), after) == (0, [], totals)


def test_completions_that_a_switched_off_coordinator_refuses_are_told(shop: Path) -> None:
    """Each line, how many and why, and exit code 1; a replay with the coordinator on completes the runs."""
    file = recording(shop / "day.jsonl")
    done, totals = replay(file, TRANSACTION_COORDINATOR_ENABLED="false")
    assert done.returncode == 1
    assert (totals["committed"], totals["rejected_lines"]) == (0, 6)
    lines = said(done)
    assert len(lines) == 7
    assert all("COORDINATOR_DISABLED: run 'run-000" in line for line in lines[:6])
    assert "6 COORDINATOR_DISABLED" in lines[6]
    assert "replay again" in lines[6]
    done, totals = replay(file)
    assert (done.returncode, totals["committed"], totals["rolled_back"]) == (0, 5, 1)


def test_completions_that_a_parked_domain_refuses_are_told(shop: Path) -> None:
    """One run is parked, which the journal tells; those after it are refused: how many and why, and exit code 1."""
    done, totals = replay(recording(shop / "two.jsonl", runs=2), STUCK="yes")
    assert (done.returncode, totals["committed"], totals["parked"]) == (0, 1, 1)
    done, totals = replay(recording(shop / "day.jsonl"), STUCK="yes")
    assert (done.returncode, totals["committed"], totals["parked"], totals["rejected_lines"]) == (1, 1, 1, 4)
    assert "4 DOMAIN_PARKED" in said(done)[-1]
    assert sum("a rollback of domain 'payments' is parked" in line for line in said(done)) == 4
    pending = {item["run_id"] for item in told("runs", "--db", "shop.db", "--verdict", "pending")}
    assert pending == {"run-0002", "run-0003", "run-0004", "run-0005"}


def test_completions_over_a_domain_without_rollback_are_told(shop: Path) -> None:
    """They are refused before anything happened: how many, and exit code 1."""
    done, totals = replay(recording(shop / "day.jsonl"), "shop:mailing")
    assert (done.returncode, totals["committed"], totals["rejected_lines"]) == (1, 0, 6)
    assert "6 ROLLBACK_NOT_SUPPORTED" in said(done)[-1]


def test_an_operation_that_ended_with_a_code_of_the_journals_is_recorded(shop: Path) -> None:
    """The recorded outcome names it: it happened to whoever recorded it, not to the replay."""
    file = recording(shop / "day.jsonl")
    file.write_text(file.read_text().replace("TOOL_ERROR", "JOURNAL_UNAVAILABLE"))
    done, totals = replay(file)
    assert (done.returncode, said(done), totals["failed_operations"]) == (0, [], 6)
