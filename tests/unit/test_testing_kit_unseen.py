"""What the check cannot see it does not claim: it says what was not checked, and why."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spine.effects import Effect
from spine.testing import ContractViolated, check_domain
from tests.unit.broken_domains import NoTombstone
from tests.unit.kept_domain import EVERY, Kept, World, names, report_of

pytestmark = pytest.mark.anyio

BLIND = {
    "repeated", "concurrent", "rollback", "rollback_repeated", "independent", "overtaken", "refusal",
    "crash", "crash_undone", "crash_rollback", "restart", "settled",
}  # fmt: skip


class Mute(Kept):
    """Nobody can ask it anything; and a late forward answers, without applying."""

    status = None  # type: ignore[assignment]

    def apply(self, effect: Effect) -> Any:
        return {} if effect.id in self.world.tombs else super().apply(effect)


async def test_without_eyes_only_what_answers_show_is_passed():
    report = await check_domain(Mute(World()))
    unchecked = {finding.clause: finding.detail for finding in report.unchecked}
    assert set(unchecked) == BLIND | {"status", "tombstoned", "tombstone"}
    assert set(names(report.passed)) == set(EVERY) - set(unchecked)
    for name in BLIND - {"refusal", "restart"}:
        assert "pass live=" in unchecked[name], name
    assert "optional" in unchecked["status"]
    assert "refused=" in unchecked["refusal"]
    assert "restarted=" in unchecked["restart"]


async def test_a_late_forward_that_raises_is_refused_whoever_looks():
    class Raises(Mute):
        def apply(self, effect: Effect) -> Any:
            return Kept.apply(self, effect)

    report = await check_domain(Raises(World()))
    assert "tombstone" in names(report.passed)
    assert set(names(report.unchecked)) == BLIND | {"status", "tombstoned"}


async def test_status_is_eyes_enough_for_all_but_the_count():
    """``applied`` may stand for one effect or for two."""
    report = await report_of(Kept, live=None)
    assert set(names(report.unchecked)) == {"repeated", "concurrent", "crash", "restart"}
    assert all("once or twice" in finding.detail for finding in report.unchecked)


async def test_a_probe_that_says_true_does_not_count():
    world = World()

    async def live(effect: Effect) -> bool:
        return bool(world.held.get(effect.id))

    report = await check_domain(Kept(world), live=live)
    assert {"repeated", "concurrent", "crash"} <= set(names(report.unchecked))


async def test_a_domain_that_never_waits_has_no_middle_to_crash_in():
    class Prompt(Kept):
        async def pause(self) -> None:
            pass

    report = await report_of(Prompt)
    unchecked = {finding.clause: finding.detail for finding in report.unchecked}
    assert set(unchecked) == {"overtaken", "cancellation", "crash", "crash_undone", "crash_rollback"}
    assert "never waits" in unchecked["crash"]


class Locked(Kept):
    """One call at a time: a lock in this process."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.lock = asyncio.Lock()
        self.timeout_s = 0.1

    async def forward(self, effect: Effect) -> Any:
        async with self.lock:
            return await super().forward(effect)

    async def rollback(self, effect: Effect) -> None:
        async with self.lock:
            await super().rollback(effect)


async def test_a_lock_in_the_process_is_not_taken_for_a_defect():
    """A dead process holds no lock; without ``restarted`` there is only this one."""
    assert names((await report_of(Locked)).passed) == EVERY
    unchecked = {finding.clause: finding.detail for finding in (await report_of(Locked, restarted=None)).unchecked}
    assert set(unchecked) == {"restart", "overtaken", "crash", "crash_undone", "crash_rollback"}
    assert "gave no answer within 0.1 s; if it waits for that forward, pass restarted=" in unchecked["overtaken"]
    assert "killed" in unchecked["crash"]


async def test_more_waits_than_can_be_tried_are_told():
    class Long(Kept):
        async def pause(self) -> None:
            for _ in range(40):
                await asyncio.sleep(0)

    unchecked = {finding.clause: finding.detail for finding in (await report_of(Long)).unchecked}
    assert unchecked["crash"] == "forward waits 80 times: only 48 of them were tried"


async def test_what_stands_on_a_broken_clause_is_not_checked():
    with pytest.raises(ContractViolated) as told:
        await report_of(NoTombstone)
    unchecked = {finding.clause: finding.detail for finding in told.value.report.unchecked}
    assert unchecked == dict.fromkeys(
        (
            "tombstoned",
            "refusal",
            "restart",
            "concurrent",
            "overtaken",
            "crash",
            "crash_undone",
            "crash_rollback",
            "settled",
        ),
        "it rests on tombstone, which is broken",
    )
