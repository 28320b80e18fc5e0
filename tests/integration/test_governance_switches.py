"""A switch says who, why and, for a bypass, until when, and the journal keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spine import Spine
from spine.kernel.errors import ConfigurationError
from tests.governed import intact, journal, running
from tests.integration.governed_shop import OPS, clock, execute, shop

HOUR_US = 3_600_000_000


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("switch", "named"),
    [
        (lambda spine: spine.bypass(reason="", actor="ann"), "reason"),
        (lambda spine: spine.bypass(reason=" \n", actor="ann"), "reason"),
        (lambda spine: spine.bypass(reason="why", actor=""), "actor"),
        (lambda spine: spine.bypass(reason="why", actor=None), "actor"),
        (lambda spine: spine.bypass(reason=5, actor="ann"), "reason"),
        (lambda spine: spine.bypass(reason="why", actor="a\x00b"), "actor"),
        (lambda spine: spine.bypass(reason="w\x00y", actor="ann"), "reason"),
        (lambda spine: spine.bypass(**OPS, for_s=0), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=-1), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=4 * 3600 + 1), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=float("nan")), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=float("inf")), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=None), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s=True), "for_s"),
        (lambda spine: spine.bypass(**OPS, for_s="60"), "for_s"),
        (lambda spine: spine.halt(reason="", actor="ann"), "reason"),
        (lambda spine: spine.degrade(reason="why", actor=" "), "actor"),
        (lambda spine: spine.restore(reason="", actor="ann"), "reason"),
    ],
)
async def test_a_switch_without_reason_actor_or_bounded_time_is_refused(
    sqlite_url: str, switch: Callable[[Spine], Any], named: str
) -> None:
    """Who, why and, for a bypass, until when: at most four hours. A refused switch changes and records nothing."""
    spine = shop(sqlite_url)
    async with running(spine):
        with pytest.raises(ConfigurationError, match=named):
            await switch(spine)
        assert spine.health().governance["state"] == "active"
    assert journal(sqlite_url) == []


@pytest.mark.anyio
async def test_a_bypass_lasts_an_hour_unless_told_otherwise(sqlite_url: str) -> None:
    """The default is one hour, the longest is four, and the journal says until when."""
    spine = shop(sqlite_url, clock=clock())
    async with running(spine):
        default = await spine.bypass(**OPS)
        longest = await spine.bypass(**OPS, for_s=4 * 3600)
    for state, hours in ((default, 1), (longest, 4)):
        assert state.expires_at is not None
        assert state.expires_at - state.since_at == hours * HOUR_US
    assert [body["expires_at"] for body in journal(sqlite_url)[:2]] == [default.expires_at, longest.expires_at]


@pytest.mark.anyio
async def test_every_switch_is_journaled_with_its_epoch_and_survives_a_restart(sqlite_url: str) -> None:
    """The chain of states can be read in the journal, and the next process begins where it stands."""
    spine = shop(sqlite_url)
    async with running(spine):
        for number, switch in enumerate([spine.degrade, spine.halt, spine.bypass, spine.restore, spine.halt], start=2):
            state = await switch(reason=f"step {number}", actor="ann")
            assert state.epoch == number
            assert spine.health().governance["state"] == state.mode.value
    changes = journal(sqlite_url, "governance.changed")
    assert [(body["from"], body["to"], body["epoch"], body["reason"]) for body in changes] == [
        ("active", "degraded", 2, "step 2"),
        ("degraded", "halted", 3, "step 3"),
        ("halted", "bypassed", 4, "step 4"),
        ("bypassed", "active", 5, "step 5"),
        ("active", "halted", 6, "step 6"),
    ]
    again = shop(sqlite_url)
    async with running(again):
        assert (again.health().governance["state"], again.health().governance["epoch"]) == ("halted", 6)
        assert (await execute(again)).error_code == "HALTED"
    intact(sqlite_url)
