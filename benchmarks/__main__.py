"""``python -m benchmarks [P1 P2 P3 P4 P8] [--quick] [--json]``: both sides, the ratio and the goal of each number."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import completion, governed, kernel, startup
from benchmarks.harness import Line, Plan, SideFailed

NUMBERS: dict[str, Callable[[Plan], list[Line]]] = {
    "P1": kernel.p1,
    "P2": governed.p2,
    "P3": governed.p3,
    "P4": completion.p4,
    "P8": startup.p8,
}
PEERS = ("pykka", "dbos")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help=f"which of {' '.join(NUMBERS)}; all without it")
    parser.add_argument(
        "--quick", action="store_true", help="one short round, to see that it works: no figures to cite"
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default and least for a median: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per figure and round")
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the databases are made: the disk that is measured"
    )
    parser.add_argument(
        "--pin", action="store_true", help="hold every side to one core, where threads hand over faster"
    )
    options = parser.parse_args()
    options.numbers = [number.upper() for number in options.numbers] or list(NUMBERS)
    unknown = [number for number in options.numbers if number not in NUMBERS]
    if unknown:
        parser.error(f"no number {', '.join(unknown)}: choose from {', '.join(NUMBERS)}")
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed: pip install -e '.[bench]'")
    return options


def machine() -> dict[str, object]:
    """Where the figures come from."""
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "pinned": len(os.sched_getaffinity(0)) == 1,
        "load": round(os.getloadavg()[0], 1),
        **{name: importlib.metadata.version(name) for name in ("anyio", "sqlalchemy", *PEERS)},
    }


def main() -> int:
    options = parse()
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if sys.stderr.isatty() else (lambda _: None)
    if options.pin:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    facts = machine()
    rounds, seconds = (1, 0.3) if options.quick else (options.rounds, options.seconds)
    kind = (
        "one quick round, no medians" if options.quick else f"medians of {rounds} interleaved rounds (lowest..highest)"
    )
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        print(f"{kind}, {seconds:g} s a figure\n")
    lines: list[Line] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="spine-benchmarks-") as folder:
        plan = Plan(rounds, seconds, Path(folder), say)
        for number in options.numbers:
            try:
                found = NUMBERS[number](plan)
            except SideFailed as error:
                failed.append(f"{number}: {error}")
                print(failed[-1], file=sys.stderr)
                continue
            lines.extend(found)
            if not options.json:
                print("\n".join(line.text() for line in found), flush=True)
    if options.json:
        results = [line.to_dict() for line in lines]
        print(json.dumps({"machine": facts, "rounds": rounds, "results": results, "failed": failed}, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
