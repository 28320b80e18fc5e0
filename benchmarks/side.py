"""What every side's program shares: its arguments, its callers and its clock."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path


def arguments(*extra: str) -> argparse.Namespace:
    """``--seconds``, ``--dir`` (where databases are made, never here by default), and the side's own text options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--dir", type=Path, required=True)
    for name in extra:
        parser.add_argument(name, default="")
    return parser.parse_args()


def report(figures: Mapping[str, float]) -> None:
    """Print the figures as the program's last line."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


async def async_rate(
    call: Callable[[int], Awaitable[object]],
    callers: int,
    seconds: float,
    finish: Callable[[], Awaitable[object]] | None = None,
) -> float:
    """Calls per second of ``callers`` tasks, each calling ``call(its number)`` again and again.

    The clock stops when the last call has ended and ``finish`` has returned.
    """
    done = 0
    started = time.perf_counter()
    until = started + seconds

    async def caller(number: int) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await call(number)
            done += 1

    await asyncio.gather(*(caller(number) for number in range(callers)))
    if finish is not None:
        await finish()
    return done / (time.perf_counter() - started)


def thread_rate(call: Callable[[], object], callers: int, seconds: float) -> float:
    """Calls per second of ``callers`` threads, each calling ``call`` again and again."""
    counts = [0] * callers
    barrier = threading.Barrier(callers + 1)
    until = 0.0

    def caller(number: int) -> None:
        barrier.wait()
        while time.perf_counter() < until:
            call()
            counts[number] += 1

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    until = started + seconds
    barrier.wait()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)
