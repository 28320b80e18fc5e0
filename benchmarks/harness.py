"""Sides, rounds and medians: how one comparison is measured and what is printed of it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIDE_TIMEOUT_S = 300
PAYLOAD = "x" * 284
"""With its key, 300 bytes of JSON: {"payload":"..."}."""


class SideFailed(Exception):
    """A side's program ended badly; the message holds the end of what it wrote."""


@dataclass(frozen=True, slots=True)
class Side:
    """One program of the comparison: a module under ``benchmarks`` and its arguments."""

    name: str
    module: str
    args: tuple[str, ...] = ()

    def run(self, seconds: float, directory: Path) -> dict[str, float]:
        """Measure once in a process and a folder of its own.

        The figures are per second unless their names end in ``_us`` or ``_ms``.
        """
        command = [sys.executable, "-m", f"benchmarks.{self.module}", "--seconds", str(seconds), *self.args]
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            done = subprocess.run(  # the folder is the side's database directory, the source tree its import path
                [*command, "--dir", folder],
                capture_output=True,
                text=True,
                timeout=SIDE_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            )
        lines = done.stdout.strip().splitlines()
        if done.returncode != 0 or not lines:
            raise SideFailed(f"{self.name} ({' '.join(command[1:])}) exited {done.returncode}: {done.stderr[-2000:]}")
        figures: dict[str, float] = json.loads(lines[-1])
        return figures


@dataclass(slots=True)
class Samples:
    """What the rounds of one side gave, figure by figure."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def best(self, prefix: str) -> str:
        """The figure starting with ``prefix`` whose median is the highest."""
        return max((name for name in self.values if name.startswith(prefix)), key=self.median)

    def spread(self, name: str) -> str:
        values = self.values[name]
        return f"{figure(name, min(values))}..{figure(name, max(values))}"


@dataclass(frozen=True, slots=True)
class Line:
    """One printed comparison; ``goal`` bounds ``ratio`` from one side and is ``None`` where none is set."""

    number: str
    work: str
    ours: str
    theirs: str
    ratio: float
    goal: tuple[str, float] | None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio >= self.goal[1] if self.goal[0] == ">=" else self.ratio <= self.goal[1]

    def text(self) -> str:
        goal = f"goal {self.goal[0]} {self.goal[1]:g}{self.unit}" if self.goal else "no goal"
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        return (
            f"{self.number}  {self.work}\n      {self.ours}\n      {self.theirs}\n"
            f"      {self.ratio:.3g}{self.unit}   {goal}   {verdict}".rstrip()
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "work": self.work,
            "ours": self.ours,
            "theirs": self.theirs,
            "value": self.ratio,
            "unit": self.unit,
            "goal": None if self.goal is None else f"{self.goal[0]} {self.goal[1]:g}{self.unit}",
            "met": self.met,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often: ``rounds`` interleaved rounds in which every side measures ``seconds`` per figure."""

    rounds: int
    seconds: float
    directory: Path
    say: Callable[[str], None]


def interleave(sides: Sequence[Side], plan: Plan) -> dict[str, Samples]:
    """Run every side once a round, the order turning from round to round, so that a slow minute hits all alike."""
    samples = {side.name: Samples() for side in sides}
    for number in range(plan.rounds):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            plan.say(f"round {number + 1} of {plan.rounds}: {side.name}")
            samples[side.name].add(side.run(plan.seconds, plan.directory))
    return samples


def fastest(sides: Mapping[str, Samples], wanted: str, *, exact: bool = False) -> tuple[str, Samples, str]:
    """The side whose figure ``wanted``, or without ``exact`` its best one starting so, has the highest median."""
    chosen = {name: wanted if exact else samples.best(wanted) for name, samples in sides.items()}
    name = max(sides, key=lambda name: sides[name].median(chosen[name]))
    return name, sides[name], chosen[name]


def figure(name: str, value: float) -> str:
    """A figure with its unit, read off its name."""
    if name.endswith("_us"):
        return f"{value:.1f} us"
    if name.endswith("_ms"):
        return f"{value:.1f} ms"
    return f"{value:,.0f}/s"


def side_text(label: str, samples: Samples, name: str) -> str:
    """``label: median (lowest..highest) [figure]``."""
    return f"{label}: {figure(name, samples.median(name))} ({samples.spread(name)}) [{name}]"


def compare(
    number: str,
    work: str,
    ours: tuple[str, Samples, str],
    theirs: tuple[str, Samples, str],
    goal: tuple[str, float] | None,
) -> Line:
    """The ratio of the two medians, ours over theirs."""
    ratio = ours[1].median(ours[2]) / theirs[1].median(theirs[2])
    return Line(number, work, side_text(*ours), side_text(*theirs), ratio, goal)
