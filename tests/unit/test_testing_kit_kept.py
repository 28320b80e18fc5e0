"""A domain that keeps the contract passes every clause, again and again, and the check leaves nothing behind."""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import spine
from spine.effects import Effect
from spine.governance.transactions import DomainClass
from spine.testing import ContractViolated, check_domain
from tests.unit.kept_domain import EVERY, Kept, World, names, report_of

pytestmark = pytest.mark.anyio

DOCS = Path(next(iter(spine.__path__))).parent / "docs"
GUIDED = ("'ledger' (LOCAL)", "'letters' (POST)")


async def test_a_domain_that_keeps_the_contract_passes_every_clause():
    report = await report_of(Kept)
    assert names(report.passed) == EVERY
    assert (report.unchecked, report.violated) == ((), ())
    assert (report.domain, report.domain_class, report.seed) == ("kept", DomainClass.EXTERNAL, "s")


async def test_a_domain_whose_replies_get_lost_passes_it_too():
    """What was applied before the connection broke is repeated, as Spine repeats it."""

    class Lossy(Kept):
        lost = itertools.count(1)

        async def pause(self) -> None:
            await super().pause()
            if next(self.lost) % 5 == 0:
                raise ConnectionError("reset by peer")

    assert names((await report_of(Lossy)).passed) == EVERY


@pytest.mark.skipif(not DOCS.exists(), reason="only a source tree has the guide")
def test_the_guide_runs_as_printed(tmp_path: Path):
    """Its pieces are one program, whose LOCAL, EXTERNAL and POST domains keep the contract."""
    guide = (DOCS / "domains.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heads = [line.split(", seed")[0] for line in done.stdout.splitlines() if line.startswith("the participant")]
    assert heads == [f"the participant contract of domain {kind}" for kind in GUIDED]
    assert "violated: " not in done.stdout


async def test_the_check_leaves_nothing_behind():
    world = World()
    await check_domain(Kept(world), live=world.live)
    assert world.held == {}
    assert len(world.tombs) > 20


async def test_what_a_broken_domain_did_is_taken_back_as_far_as_it_goes():
    class Twice(Kept):
        def apply(self, effect: Effect) -> Any:
            return self.world.add(effect.id)

    world = World()
    with pytest.raises(ContractViolated):
        await check_domain(Twice(world))
    assert world.held == {}


async def test_a_cancelled_check_leaves_no_call_running():
    started = asyncio.Event()

    class Waits(Kept):
        async def forward(self, effect: Effect) -> Any:
            started.set()
            await asyncio.sleep(60)

    before = asyncio.all_tasks()
    check = asyncio.create_task(check_domain(Waits(World())))
    await started.wait()
    check.cancel()
    with pytest.raises(asyncio.CancelledError), anyio.fail_after(5):
        await check
    assert asyncio.all_tasks() == before


async def test_the_same_seed_calls_with_the_same_ids_in_the_same_order():
    first, second, other = World(), World(), World()
    for world, seed in ((first, "7"), (second, "7"), (other, "8")):
        await check_domain(Kept(world), live=world.live, seed=seed)
    ids = [{effect_id for _, effect_id in world.seen} for world in (first, second, other)]
    assert ids[0] == ids[1]
    assert not ids[0] & ids[2]


async def test_without_a_seed_a_system_that_remembers_can_be_checked_again():
    world = World()
    for _ in range(2):
        assert (await check_domain(Kept(world), live=world.live)).violated == ()


def test_it_is_run_by_asyncio_alone():
    assert asyncio.run(check_domain(Kept(World()))).domain == "kept"
