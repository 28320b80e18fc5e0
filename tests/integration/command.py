"""The command as its users run it: a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import spine
from spine.cli import main

ROOT = Path(next(iter(spine.__path__))).parent
RECORDED = ROOT.parent / "shared" / "data" / "agent-runs.jsonl"
COMMAND = [sys.executable, "-m", "spine.cli.main"]


def run(
    *args: str | Path, timeout: float = 60, stdin: bytes | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def inside(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process: for the many cases in which no process of its own is at stake."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run([*map(str, args)])
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def ok(*args: str | Path, **kwargs: Any) -> str:
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(*args: str | Path, code: int = 0, **kwargs: Any) -> Any:
    """What ``--json`` says."""
    done = run(*args, "--json", **kwargs)
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def refused(*args: str | Path, code: int = 2, by: Callable[..., Any] = run, **kwargs: Any) -> str:
    """The one line of an error."""
    done = by(*args, **kwargs)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("spine: ")
    return lines[0]


def on_terminal(*args: str | Path, **env: str) -> str:
    """What a person at a terminal sees."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **env},
        )
        os.close(slave)
        slave = -1
        seen = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:
                break
            if not chunk:
                break
            seen += chunk
        process.wait(60)
        return seen.decode()
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)


def recording(path: Path, runs: int = 6, operations: int = 4) -> Path:
    """A recorded file: every third run failed, every fourth operation too; the lines of two runs are interleaved."""
    lanes: list[list[dict[str, Any]]] = []
    for number in range(runs):
        run_id = f"run-{number:04}"
        lane: list[dict[str, Any]] = [{"type": "run.started", "run_id": run_id, "tenant_id": "acme", "agent_id": "a7"}]
        for ordinal in range(operations):
            good = {"success": True, "result_bytes": ordinal}
            bad = {"success": False, "error": "Error: no such user", "error_code": "TOOL_ERROR"}
            lane.append(
                {
                    "type": "operation",
                    "run_id": run_id,
                    "operation": f"shop.tool_{ordinal % 3}",
                    "params": {"n": number, "ordinal": ordinal},
                    "outcome": bad if ordinal % 4 == 3 else good,
                }
            )
        failed = number % 3 == 2
        lane.append(
            {
                "type": "run.completed",
                "run_id": run_id,
                "run_status": "failed" if failed else "succeeded",
                "error_code": "TASK_NOT_SOLVED" if failed else None,
                "error_message": "goal missed" if failed else None,
            }
        )
        lanes.append(lane)
    lines: list[dict[str, Any]] = []
    for pair in zip(lanes[::2], lanes[1::2], strict=True):
        for both in zip(*pair, strict=True):
            lines += both
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
