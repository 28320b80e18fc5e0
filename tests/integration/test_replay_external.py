"""Replaying runs whose payment is EXTERNAL and fails for every tenth: each ends committed or rolled back."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import COMMAND, RECORDED, ROOT, told

FAILURE = "ConnectionError"


@dataclass
class Shop:
    """A file of runs, the application's ledger, and the database."""

    folder: Path
    file: Path
    failing: set[str]

    @property
    def env(self) -> dict[str, str]:
        fails = self.folder / "fails.json"
        fails.write_text(json.dumps(sorted(self.failing)), encoding="utf-8")
        return {"PAYDAY_LEDGER": str(self.folder / "ledger.db"), "PAYDAY_FAILS": str(fails), "PYTHONPATH": str(ROOT)}

    @property
    def db(self) -> str:
        return str(self.folder / "spine.db")

    def replay(self) -> dict[str, Any]:
        found: dict[str, Any] = told("replay", self.file, "--app", APP, "--db", self.db, timeout=240, **self.env)
        return found

    def verdicts(self) -> dict[str, str]:
        return {run["run_id"]: run["verdict"] for run in told("runs", "--db", self.db)}

    def live(self) -> set[str]:
        with closing(sqlite3.connect(self.folder / "ledger.db")) as db:
            return {run for (run,) in db.execute("SELECT run FROM paid WHERE live = 1")}

    def rows(self) -> int:
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM journal").fetchone()[0])
        return 0


APP = "tests.integration.payday:spine"


def lines_of(runs: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for n in range(runs):
        run = {"run_id": f"run-{n:03}"}
        found.append({"type": "run.started", "tenant_id": "acme", "agent_id": "a7", **run})
        found.append(
            {"type": "operation", "operation": "desk.book", "params": {"n": n}, "outcome": {"success": True}} | run
        )
        found.append(
            {"type": "run.completed", "run_status": "succeeded", "error_code": None, "error_message": None} | run
        )
    return found


def made(folder: Path, lines: list[dict[str, Any]]) -> Shop:
    file = folder / "runs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    started = [line["run_id"] for line in lines if line["type"] == "run.started"]
    return Shop(folder, file, set(started[9::10]))


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
