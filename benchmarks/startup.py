"""P8: what ``import spine`` and ``spine --help`` add to the start of a bare interpreter."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.harness import Line, Plan, Samples, SideFailed, side_text

STARTS = 3
"""Starts of each program in a round; the quickest counts, since noise only adds."""

PROGRAMS = {
    "bare": ["-c", "pass"],
    "import": ["-c", "import spine"],
    "class": ["-c", "from spine import Spine"],
    "help": ["-c", "from spine.cli.main import main; main()", "--help"],
}


def p8(plan: Plan) -> list[Line]:
    samples = {name: Samples() for name in PROGRAMS}
    for command in PROGRAMS.values():
        start(command)
    for number in range(plan.rounds):
        plan.say(f"round {number + 1} of {plan.rounds}: start-up")
        quickest = dict.fromkeys(PROGRAMS, float("inf"))
        for _ in range(STARTS):
            for name, command in PROGRAMS.items():
                quickest[name] = min(quickest[name], start(command))
        for name, value in quickest.items():
            samples[name].add({"start_ms": value})
    return [
        line("spine --help", "help", 150.0, samples),
        line("import spine", "import", 250.0, samples),
        line("from spine import Spine, which loads all but the journal", "class", None, samples),
    ]


def line(work: str, name: str, most: float | None, samples: dict[str, Samples]) -> Line:
    extra = samples[name].median("start_ms") - samples["bare"].median("start_ms")
    ours = side_text("spine", samples[name], "start_ms")
    theirs = side_text("bare interpreter", samples["bare"], "start_ms")
    goal = None if most is None else ("<=", most)
    return Line("P8", f"{work}: time added to a bare interpreter's start", ours, theirs, extra, goal, " ms")


def start(command: list[str]) -> float:
    """Milliseconds from start to exit."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    took = (time.perf_counter() - began) * 1e3
    if done.returncode != 0:
        raise SideFailed(f"{' '.join(command)} exited {done.returncode}: {done.stderr[-2000:]}")
    return took
