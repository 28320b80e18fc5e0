"""Runs in a file, replayed by the command through ``payday``, and what is left of them in ledger and journal."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.command import ROOT, told

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

    def replay(self, **env: str) -> dict[str, Any]:
        command = ("replay", self.file, "--app", APP, "--db", self.db)
        found: dict[str, Any] = told(*command, timeout=240, **self.env, **env)
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
