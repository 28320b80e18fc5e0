"""Replaying runs whose payment is EXTERNAL and fails for every tenth: each ends committed or rolled back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.command import COMMAND, RECORDED, told
from tests.integration.shop import APP, FAILURE, lines_of, made


@pytest.mark.timeout(300)
def test_the_recorded_runs_end_committed_or_rolled_back_and_why_names_the_failing_step(tmp_path: Path) -> None:
    """15 of 150 are rolled back, each naming the payment and its rollback; a second replay changes nothing."""
    if not RECORDED.exists():
        pytest.skip(f"no recorded runs at {RECORDED.name}: they do not lie beside this checkout")
    shop = made(tmp_path, [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()])
    totals = shop.replay()
    assert (totals["runs"], totals["operations"]) == (150, 862)
    assert (totals["committed"], totals["rolled_back"], totals["parked"], totals["rejected_lines"]) == (135, 15, 0, 0)
    verdicts = shop.verdicts()
    assert {run for run, verdict in verdicts.items() if verdict == "rolled_back"} == shop.failing
    assert shop.live() == verdicts.keys() - shop.failing
    for run in sorted(shop.failing)[:3]:
        why = told("why", run, "--db", shop.db, code=4)
        assert (why["verdict"], why["cause"]["code"]) == ("rolled_back", FAILURE)
        assert "payments" in why["cause"]["text"]
        (payment,) = [domain for domain in why["transaction"]["domains"] if domain["name"] == "payments"]
        assert (payment["class"], payment["state"]) == ("EXTERNAL", "ROLLED_BACK")
        assert "card network" in payment["error"]
    again = shop.replay()
    assert {**again, "seconds": 0} == {**totals, "seconds": 0}
    assert told("verify", "--db", shop.db)["ok"]


@pytest.mark.timeout(300)
def test_a_replay_killed_anywhere_and_started_again_ends_with_the_same_verdicts(tmp_path: Path) -> None:
    """kill -9 whenever the journal has grown by so many rows, again and again: the end is that of the quiet replay."""
    (tmp_path / "quiet").mkdir()
    (tmp_path / "killed").mkdir()
    quiet, killed = made(tmp_path / "quiet", lines_of(40)), made(tmp_path / "killed", lines_of(40))
    expected = quiet.replay()
    random_ = random.Random(7)
    kills = 0
    for _ in range(5):
        command = [*COMMAND, "replay", str(killed.file), "--app", APP, "--db", killed.db, "--json"]
        replaying = subprocess.Popen(command, env={**os.environ, **killed.env}, stdout=subprocess.DEVNULL)
        enough = killed.rows() + random_.randint(5, 90)
        while replaying.poll() is None and killed.rows() < enough:
            time.sleep(0.001)
        kills += replaying.poll() is None
        replaying.send_signal(signal.SIGKILL)
        replaying.wait()
    assert kills >= 4
    totals = killed.replay()
    same = ("runs", "operations", "committed", "rolled_back", "parked", "events", "rejected_lines")
    assert {name: totals[name] for name in same} == {name: expected[name] for name in same}
    assert killed.verdicts() == quiet.verdicts()
    assert killed.live() == quiet.live() == killed.verdicts().keys() - killed.failing
    assert told("verify", "--db", killed.db)["ok"]
