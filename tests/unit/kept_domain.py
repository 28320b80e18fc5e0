"""A domain that keeps the contract of participants, and what the check says of it and its descendants."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from spine.domains import Refused, RunFacts
from spine.effects import ABSENT, APPLIED, TOMBSTONED, Effect
from spine.governance.transactions import DomainClass
from spine.testing import ContractViolated, Report, check_domain
from spine.testing.contract import CONTRACT

POOR = RunFacts("run-poor", "poor", "succeeded", "", 0)
EVERY = ["declared", *(clause.name for clause in CONTRACT[DomainClass.EXTERNAL])]


class World:
    """The other system: what it holds by effect id, each entry one effect, and its tombstones."""

    def __init__(self) -> None:
        self.held: dict[str, list[dict[str, Any]]] = {}
        self.tombs: set[str] = set()
        self.numbers = itertools.count(1)
        self.seen: list[tuple[str, str]] = []

    def add(self, key: str) -> dict[str, Any]:
        entry = {"id": f"entry-{next(self.numbers)}", "cents": 100}
        self.held.setdefault(key, []).append(entry)
        return entry

    async def live(self, effect: Effect) -> int:
        return len(self.held.get(effect.id, ()))


class Kept:
    """An EXTERNAL domain that keeps the contract; its descendants each break one clause of it."""

    name = "kept"
    after: Sequence[str] = ()
    timeout_s = 5.0
    attempts = 2

    def __init__(self, world: World) -> None:
        self.world = world

    def describe(self, run: RunFacts) -> Mapping[str, Any]:
        return {"account": run.tenant_id, "lines": [1]}

    async def forward(self, effect: Effect) -> Any:
        self.world.seen.append(("forward", effect.id))
        await self.pause()
        answer = self.apply(effect)
        await self.pause()
        return answer

    def apply(self, effect: Effect) -> Any:
        if effect.id in self.world.tombs:
            raise Refused("GONE", "it was rolled back")
        if effect.descriptor["account"] == "poor":
            raise Refused("NO_FUNDS", "the account is empty")
        held = self.world.held.get(effect.id)
        return held[0] if held else self.world.add(effect.id)

    async def rollback(self, effect: Effect) -> None:
        self.world.seen.append(("rollback", effect.id))
        await self.pause()
        self.undo(effect)
        await self.pause()

    def undo(self, effect: Effect) -> None:
        self.world.held.pop(effect.id, None)
        self.world.tombs.add(effect.id)

    async def status(self, effect: Effect) -> Any:
        await self.pause()
        return self.says(effect)

    def says(self, effect: Effect) -> Any:
        if effect.id in self.world.tombs:
            return TOMBSTONED
        return APPLIED if self.world.held.get(effect.id) else ABSENT

    async def pause(self) -> None:
        await asyncio.sleep(0)


async def report_of(kind: Callable[[World], Any], **more: Any) -> Report:
    """What the kit says of a domain when it is given all the help there is."""
    world = World()
    more = {"live": world.live, "refused": POOR, "restarted": lambda: kind(world), "seed": "s", **more}
    return await check_domain(kind(world), **more)


async def violated(kind: Callable[[World], Any], **more: Any) -> dict[str, str]:
    """The broken clauses with what happened."""
    with pytest.raises(ContractViolated) as told:
        await report_of(kind, **more)
    return {finding.clause: finding.detail for finding in told.value.report.violated}


def names(findings: Sequence[Any]) -> list[str]:
    return [finding.clause for finding in findings]
