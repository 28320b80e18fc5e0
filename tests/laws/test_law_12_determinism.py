"""Law 12: same seed, same inputs, one caller at a time: same decisions, same journal bytes, on a virtual clock."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spine import OperationContext, Spine
from spine.kernel.clock import VirtualClock
from spine.settings import Settings
from tests.laws import day
from tests.laws.world import START_US, assert_intact, rows

pytestmark = pytest.mark.anyio


def at(folder: Path, name: str) -> str:
    return f"sqlite+aiosqlite:///{folder / name}.db"


def differences(one: list[tuple[Any, ...]], two: list[tuple[Any, ...]]) -> list[str]:
    """Where two journals part, for the reader of a failure."""
    found = []
    for left, right in zip(one, two, strict=False):
        for a, b in zip(left, right, strict=True):
            if a != b and isinstance(a, str) and a.startswith("{"):
                mine, theirs = json.loads(a), json.loads(b)
                found += [
                    f"row {left[1]}, {mine['kind']}, {name}: {mine.get(name)!r} and {theirs.get(name)!r}"
                    for name in {*mine, *theirs}
                    if mine.get(name) != theirs.get(name)
                ]
    return found[:5]


async def test_the_same_day_twice_leaves_the_same_journal_byte_for_byte(tmp_path: Path) -> None:
    """Every kind of call, failing events, denials, a bypass, keys, nested and buffered operations, in all columns."""
    urls = [at(tmp_path, name) for name in ("one", "two")]
    for url in urls:
        await day.run(url, seed=42)
    one, two = map(day.journal, urls)
    assert differences(one, two) == []
    assert one == two
    kinds = {row["kind"] for row in rows(urls[0])}
    assert len(kinds) >= 14, kinds
    for url in urls:
        assert_intact(url)


async def test_another_seed_makes_other_ids_and_the_same_decisions(tmp_path: Path) -> None:
    """What is decided does not hang on chance; what things are called does."""
    urls = [at(tmp_path, name) for name in ("one", "two")]
    for seed, url in enumerate(urls):
        await day.run(url, seed=seed)
    one, two = map(rows, urls)
    said = ("kind", "operation", "allowed", "degraded", "code", "reason", "rules", "success", "error_code", "params")
    assert [[row.get(name) for name in said] for row in one] == [[row.get(name) for name in said] for row in two]
    decisions = [{row["decision_id"] for row in told if row["kind"] == "decision"} for told in (one, two)]
    assert not decisions[0] & decisions[1]


async def test_a_crash_in_the_day_happens_the_same_way_again(tmp_path: Path) -> None:
    """Restarts, their backoff and its jitter come from the same clock and the same seed."""
    urls = [at(tmp_path, name) for name in ("one", "two")]
    for url in urls:
        await day.run(url, seed=7, crash=True)
    one, two = map(day.journal, urls)
    assert differences(one, two) == []
    assert one == two


async def test_two_processes_with_other_hash_seeds_leave_the_same_journal(tmp_path: Path) -> None:
    """Nothing depends on the order of a set, on an address or on what ran before in the process."""

    async def process(hash_seed: int) -> str:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(day.__file__)),
            at(tmp_path, f"process-{hash_seed}"),
            "42",
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, complaints = await asyncio.wait_for(child.communicate(), 40)
        assert child.returncode == 0, complaints.decode()[-2000:]
        return out.decode().split()[-1]

    digests = await asyncio.gather(process(1), process(2))
    assert digests[0] == digests[1]
    await day.run(at(tmp_path, "here"), seed=42)
    assert day.digest(at(tmp_path, "here")) == digests[0]


async def test_the_record_of_a_virtual_day_holds_only_virtual_times(sqlite_url: str) -> None:
    """Times are the clock's own and durations what it passed: nothing of the machine's time comes in."""
    clock = VirtualClock(START_US)
    spine = Spine(sqlite_url, settings=Settings(clock=clock, seed=1))

    @spine.operation("work.waits")
    async def waits(ctx: OperationContext) -> None:
        await clock.sleep_until(clock.monotonic() + 2.5)

    async with spine:
        await clock.advance(10)
        call = asyncio.ensure_future(spine.execute("work.waits", tenant_id="acme", run_id="run-1"))
        while not any(row["kind"] == "decision" for row in rows(sqlite_url)):
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        await clock.advance(2.5)
        result = await call
    assert result.duration_ms == 2500.0
    (decision,) = [row for row in rows(sqlite_url) if row["kind"] == "decision"]
    (outcome,) = [row for row in rows(sqlite_url) if row["kind"] == "outcome"]
    assert decision["at"] == START_US + 10_000_000
    assert outcome["at"] == START_US + 12_500_000
    assert outcome["handle_us"] == 2_500_000
    assert {row["at"] for row in rows(sqlite_url)} <= {decision["at"], outcome["at"]}


async def test_without_a_seed_two_days_differ(tmp_path: Path) -> None:
    """The property above is the seed's doing, not the test's: real Spines share no ids."""
    made = []
    for name in ("one", "two"):
        spine = Spine(at(tmp_path, name), settings=Settings(clock=VirtualClock(START_US)))
        async with spine:
            await spine.start_run("run-1", tenant_id="acme")
        made.append(day.journal(at(tmp_path, name)))
    assert made[0] != made[1]
