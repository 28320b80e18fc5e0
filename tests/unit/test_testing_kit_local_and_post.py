"""LOCAL and POST domains have clauses of their own, and the check names those that are broken."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest

from spine.domains import Refused, RunFacts
from spine.effects import Effect
from spine.governance.units import Write
from spine.testing import ContractViolated, check_domain
from tests.unit.kept_domain import POOR, World, names, report_of, violated

pytestmark = pytest.mark.anyio


# -- LOCAL


class Bills:
    name = "bills"
    after = ("incidents",)

    def plan(self, run: RunFacts) -> Any:
        if run.tenant_id == "poor":
            raise Refused("NO_FUNDS", "the account is empty")
        return [Write("INSERT INTO bills VALUES (:id, :at)", {"id": run.effect_id, "at": run.completed_at})]


class Random(Bills):
    def plan(self, run: RunFacts) -> Any:
        return [Write("INSERT INTO bills VALUES (:id)", {"id": str(uuid.uuid4())})]


class Forgetful(Bills):
    def __init__(self) -> None:
        self.made = id(self)

    def plan(self, run: RunFacts) -> Any:
        return [Write("INSERT INTO bills VALUES (:id)", {"id": self.made})]


class Statement(Bills):
    def plan(self, run: RunFacts) -> Any:
        return ["DELETE FROM bills"]


class Slow(Bills):
    def plan(self, run: RunFacts) -> Any:
        time.sleep(0.55)
        return super().plan(run)


class NoRefusal(Bills):
    def plan(self, run: RunFacts) -> Any:
        return []


async def test_a_local_domain_passes():
    report = await check_domain(Bills(), refused=POOR, restarted=Bills)
    assert names(report.passed) == ["declared", "writes", "loop", "pure", "refusal"]
    assert report.unchecked == report.violated == ()


@pytest.mark.parametrize(
    ("domain", "clauses"),
    [
        (Random(), ["pure"]),
        (Forgetful(), ["pure"]),
        (Statement(), ["writes"]),
        (Slow(), ["loop"]),
        (NoRefusal(), ["refusal"]),
    ],
)
async def test_a_local_domain_that_breaks_a_clause_is_named(domain: Any, clauses: list[str]):
    refused = POOR if isinstance(domain, (NoRefusal, Slow)) else None
    kept: list[object] = []

    def restarted() -> object:
        kept.append(type(domain)())
        return kept[-1]

    with pytest.raises(ContractViolated) as told:
        await check_domain(domain, refused=refused, restarted=restarted)
    assert names(told.value.report.violated) == clauses


# -- POST


class Mails:
    name = "mails"
    after = ()
    timeout_s = 5.0

    def __init__(self, world: World) -> None:
        self.world = world

    async def post(self, effect: Effect) -> None:
        await asyncio.sleep(0)
        if effect.id not in self.world.held:
            self.world.add(effect.id)
        await asyncio.sleep(0)


class MailsAgain(Mails):
    async def post(self, effect: Effect) -> None:
        await asyncio.sleep(0)
        self.world.add(effect.id)


class MailsOnce(Mails):
    async def post(self, effect: Effect) -> None:
        if effect.id in self.world.held:
            raise FileExistsError("it was sent")
        await super().post(effect)


async def test_a_post_domain_passes():
    report = await report_of(Mails)
    assert names(report.passed) == [
        "declared", "descriptor", "answers", "loop", "repeated", "restart", "concurrent", "cancellation", "crash",
    ]  # fmt: skip
    assert report.unchecked == report.violated == ()


@pytest.mark.parametrize("kind", [MailsAgain, MailsOnce])
async def test_a_post_domain_that_cannot_be_called_again_is_named(kind: Any):
    assert list(await violated(kind)) == ["repeated"]
