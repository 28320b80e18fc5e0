"""Starts lives: a process that has imported everything, opened nothing, and forks one process a life.

``python -m tests.crash.lives`` reads, a line of JSON each, lives to live at the same time, and answers with their exit
statuses, negative for the signal that ended one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.crash.life import Blow

ROOT = Path(__file__).parents[2]
LONGEST_S = 40.0
KILLED = -signal.SIGKILL


class Lives:
    """The client's side."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SPINE_")}
        places = [str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.lives"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )

    def live(self, url: str, place: Path, *, runs: Sequence[str] = (), blow: Blow | None = None) -> int:
        """Let an application live that completes the ``runs``, or that only recovers; its exit status.

        Its log is ``place/log``.
        """
        (status,) = self.together(url, place, [(runs, blow)])
        return status

    def together(self, url: str, place: Path, lives: Sequence[tuple[Sequence[str], Blow | None]]) -> list[int]:
        """Let several live at the same time; their exit statuses."""
        specs = [
            {"url": url, "place": str(place), "runs": runs, "blow": None if blow is None else asdict(blow)}
            for runs, blow in lives
        ]
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(specs).encode() + b"\n")
        process.stdin.flush()
        statuses: list[int] = json.loads(process.stdout.readline())
        return statuses

    def close(self) -> None:
        self._process.communicate(timeout=LONGEST_S)


def serve() -> None:
    from tests.crash.life import hurry, live, preload

    hurry()
    preload()
    gc.freeze()
    for line in sys.stdin:
        born = [_born(live, spec) for spec in json.loads(line)]
        print(json.dumps([_end(pid) for pid in born]), flush=True)


def _born(live: Callable[[dict[str, Any]], None], spec: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(Path(spec["place"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        live(spec)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end(pid: int) -> int:
    give_up = time.monotonic() + LONGEST_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > give_up:
            # Not SIGKILL: that is how a life is meant to end.
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
