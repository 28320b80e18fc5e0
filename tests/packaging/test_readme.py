"""README keeps its word: its programs run as printed, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spine

SOURCE = Path(next(iter(spine.__path__))).parent
README = SOURCE / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="only a source tree has the README")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(program: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_service_of_the_readme_runs_as_printed(tmp_path):
    service, _, _ = blocks("python")
    shown = run(f"import asyncio\n{service}\nasyncio.run(main())\n", tmp_path)
    assert "run-1" in shown
    assert "succeeded" in shown


def test_the_domain_of_the_readme_runs_as_printed(tmp_path):
    _, domain, _ = blocks("python")
    shown = run(f"import asyncio\n{domain}\nasyncio.run(main())\n", tmp_path)
    assert "payment-run-7" in shown
    assert "ROLLED_BACK NO_CREDIT" in shown
    assert "payments (EXTERNAL) ROLLED_BACK: this agent may not pay" in shown


def test_the_worker_of_the_readme_runs_as_printed(tmp_path):
    _, _, worker = blocks("python")
    assert run(f"{worker}\nprint(result.is_complete)\n", tmp_path).split()[-1] == "True"
    assert "spine" not in re.findall(r"^(?:from|import) (\w+)", worker, re.MULTILINE)


def test_the_example_runs_and_refuses_the_large_refund(tmp_path):
    shown = run((SOURCE / "examples" / "refunds.py").read_text(encoding="utf-8"), tmp_path)
    assert "REFUND_LIMIT" in shown
    assert "completed: " in shown


def test_every_file_the_readme_names_exists():
    text = README.read_text(encoding="utf-8")
    named = {*re.findall(r"\]\(((?!https?:)[^)#]+)\)", text), *re.findall(r"`(tests/[^`]+\.py)`", text)}
    assert named
    assert [pattern for pattern in sorted(named) if not any(SOURCE.glob(pattern))] == []


def test_every_command_the_readme_names_is_known_to_the_command():
    from spine.cli.main import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"`spine ([a-z]+)", README.read_text(encoding="utf-8")))
    assert named <= known


def test_the_first_line_says_what_it_is_and_the_commands_need_nothing_but_python():
    first, second = blocks("sh")
    assert [line.strip().count("\n") for line in (first, second)] == [0, 0]
    for line in (first, second):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
