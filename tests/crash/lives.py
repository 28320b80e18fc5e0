"""Starts lives: a process that has imported everything, opened nothing, and forks one process a life.

``python -m tests.crash.lives`` reads one life a line as JSON and answers each with its exit status, negative for the
signal that ended it.
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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.crash.life import Blow

ROOT = Path(__file__).parents[2]
LONGEST_S = 40.0
KILLED = -signal.SIGKILL


class Lives:
    """The client's side; one life at a time."""

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
        spec = {"url": url, "place": str(place), "runs": runs, "blow": None if blow is None else asdict(blow)}
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=LONGEST_S)


def serve() -> None:
    from tests.crash.life import hurry, live, preload

    hurry()
    preload()
    gc.freeze()
    for line in sys.stdin:
        spec = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be(live, spec)
        print(_end(pid), flush=True)


def _be(live: Any, spec: dict[str, Any]) -> None:
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
