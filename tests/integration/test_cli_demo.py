"""``spine demo``: every kind of ending in a few seconds, on a database it names."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.integration.command import ok, on_terminal, run, told


def test_the_demo_shows_why_and_names_what_to_try_next() -> None:
    began = time.monotonic()
    done = run("demo")
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert took < 5, f"{took:.1f} s"
    assert "\x1b" not in done.stdout
    for verdict in ("succeeded", "denied", "failed", "rolled back"):
        assert verdict in done.stdout
    assert "run run-split-refund rolled back\ncause: REFUND_NOT_BOOKED: " in done.stdout
    commands = re.findall(r"^  spine (.+)$", done.stdout, re.MULTILINE)
    assert len(commands) == 4
    codes = {command.split()[0]: run(*command.split()).returncode for command in commands}
    assert codes == {"why": 3, "ops": 0, "verify": 0}
    database = Path(commands[0].split()[-1])
    assert database.is_file()
    assert not Path("spine.db").exists()


def test_the_demo_can_be_kept(tmp_path: Path) -> None:
    answer = told("demo", "--db", "kept.db")
    assert answer["why"]["verdict"] == "rolled_back"
    assert answer["database"].endswith("kept.db")
    assert (tmp_path / "kept.db").is_file()
    assert ok("runs", "--db", "kept.db").count("\n") == 6


def test_the_demo_is_coloured_on_a_terminal() -> None:
    assert "\x1b[" in on_terminal("demo")
