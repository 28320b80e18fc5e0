"""The contract kit finds each defect of a domain by the name of its clause, and claims nothing it has not seen."""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

import spine
from spine.domains import BUILT_INS, Refused, RunFacts
from spine.effects import ABSENT, APPLIED, TOMBSTONED, Effect
from spine.governance.transactions import DomainClass
from spine.governance.units import Write
from spine.kernel.errors import ConfigurationError, SpineError
from spine.testing import ContractViolated, Report, check_domain
from spine.testing.contract import CONTRACT

pytestmark = pytest.mark.anyio

DOCS = Path(next(iter(spine.__path__))).parent / "docs"
GUIDED = ("'ledger' (LOCAL)", "'letters' (POST)")
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


# -- a domain that keeps the contract


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


# -- what it cannot see it does not claim

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


# -- domains that each break one clause


class NewAnswer(Kept):
    """No idempotency: every call books."""

    def apply(self, effect: Effect) -> Any:
        return self.world.add(effect.id) if effect.id in self.world.held else super().apply(effect)


class SilentlyTwice(Kept):
    """The same answer, but booked once more."""

    def apply(self, effect: Effect) -> Any:
        known = effect.id in self.world.held
        answer = super().apply(effect)
        if known:
            self.world.add(effect.id)
        return answer


class ByAttempt(Kept):
    """The idempotency key changes with every attempt."""

    def apply(self, effect: Effect) -> Any:
        return {**super().apply(effect), "key": f"{effect.id}:{effect.attempt}"}


class ByEpoch(Kept):
    def apply(self, effect: Effect) -> Any:
        return {**super().apply(effect), "key": f"{effect.id}:{effect.epoch}"}


class LooksFirst(Kept):
    """A look, a wait, and then the act: two duplicates both look before either acts."""

    async def forward(self, effect: Effect) -> Any:
        known = effect.id in self.world.held
        await self.pause()
        return Kept.apply(self, effect) if known or effect.id in self.world.tombs else self.fresh(effect)

    def fresh(self, effect: Effect) -> Any:
        Kept.apply(self, effect) if effect.descriptor["account"] == "poor" else None
        return self.world.add(effect.id)


class RefusesDuplicates(Kept):
    """The second of two at the same time hears a business no, which would undo the first."""

    async def forward(self, effect: Effect) -> Any:
        under_way = self.world.__dict__.setdefault("under_way", set())
        if effect.id in under_way:
            raise Refused("BUSY", "it is under way")
        under_way.add(effect.id)
        try:
            return await super().forward(effect)
        finally:
            under_way.discard(effect.id)


class NoUndo(Kept):
    def undo(self, effect: Effect) -> None:
        self.world.tombs.add(effect.id)


class UndoOnce(Kept):
    def undo(self, effect: Effect) -> None:
        if effect.id in self.world.tombs:
            raise LookupError("it was rolled back before")
        super().undo(effect)


class UndoneTwice(Kept):
    """Undone by the opposite action, so that a repeat goes too far and the entry comes back."""

    def undo(self, effect: Effect) -> None:
        self.world.add(effect.id) if effect.id in self.world.tombs else super().undo(effect)


class KnownOnly(Kept):
    def undo(self, effect: Effect) -> None:
        if effect.id not in self.world.held and effect.id not in self.world.tombs:
            raise LookupError("no such effect")
        super().undo(effect)


class NoTombstone(Kept):
    def undo(self, effect: Effect) -> None:
        self.world.held.pop(effect.id, None)


class TombstoneOfTheApplied(Kept):
    """Where there was nothing to undo it leaves no tombstone."""

    def undo(self, effect: Effect) -> None:
        if effect.id in self.world.held:
            super().undo(effect)


class RefusesButApplies(Kept):
    """A late forward is told no, and applied all the same."""

    def apply(self, effect: Effect) -> Any:
        if effect.id in self.world.tombs:
            self.world.add(effect.id)
        return super().apply(effect)


class AlwaysApplied(Kept):
    def says(self, effect: Effect) -> Any:
        return APPLIED


class NeverApplied(Kept):
    def says(self, effect: Effect) -> Any:
        return TOMBSTONED if effect.id in self.world.tombs else ABSENT


class OwnWords(Kept):
    def says(self, effect: Effect) -> Any:
        return super().says(effect).upper()


class NoWordForTombstones(Kept):
    def says(self, effect: Effect) -> Any:
        return APPLIED if self.world.held.get(effect.id) else ABSENT


class LateRefused(Kept):
    """A refused effect leaves no tombstone, and its duplicate finds money on the account."""

    def apply(self, effect: Effect) -> Any:
        if effect.descriptor["account"] != "poor":
            return super().apply(effect)
        met = self.world.__dict__.setdefault("met", set())
        if effect.id in met:
            return self.world.add(effect.id)
        met.add(effect.id)
        return super().apply(effect)


class NoByValueError(Kept):
    def apply(self, effect: Effect) -> Any:
        try:
            return super().apply(effect)
        except Refused as no:
            raise ValueError(str(no)) from no


class ByRun(Kept):
    """The run names the effect, so that the next attempt at the run meets the tombstone of the last one."""

    def apply(self, effect: Effect) -> Any:
        if effect.run_id in self.world.tombs:
            raise Refused("GONE", "it was rolled back")
        return super().apply(effect)

    def undo(self, effect: Effect) -> None:
        super().undo(effect)
        self.world.tombs.add(effect.run_id)


class UndoesAll(Kept):
    def undo(self, effect: Effect) -> None:
        self.world.held.clear()
        self.world.tombs.add(effect.id)


class TombstoneSeenTooEarly(Kept):
    """The tombstone is looked for in a call before the one that applies."""

    async def forward(self, effect: Effect) -> Any:
        if effect.id in self.world.tombs:
            raise Refused("GONE", "it was rolled back")
        await self.pause()
        tombs, self.world.tombs = self.world.tombs, set()
        try:
            return self.apply(effect)
        finally:
            self.world.tombs = tombs


class Swallows(Kept):
    async def pause(self) -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            await asyncio.sleep(1.2)


class InMemory(Kept):
    """It remembers what it did, in this process."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.known: dict[str, Any] = {}

    def apply(self, effect: Effect) -> Any:
        if effect.id not in self.known:
            answer = Kept.apply(self, effect)
            self.known[effect.id] = {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{id(self)}")), **answer, "by": id(self)}
        elif effect.id in self.world.tombs:
            return Kept.apply(self, effect)
        return self.known[effect.id]


class KeyFirst(Kept):
    """The key is durable before the effect: a crash between them loses the effect for ever."""

    async def forward(self, effect: Effect) -> Any:
        keys = self.world.__dict__.setdefault("keys", set())
        if effect.id in keys and effect.id not in self.world.tombs:
            return {"key": effect.id}
        if effect.descriptor["account"] != "poor" and effect.id not in self.world.tombs:
            keys.add(effect.id)
        await self.pause()
        self.apply(effect)
        return {"key": effect.id}


class FinishesAlone(Kept):
    """Given up, it is finished by somebody else, after its rollback and ``later`` further ones."""

    later = 0

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.queue: dict[str, int] = self.world.__dict__.setdefault("queue", {})

    async def forward(self, effect: Effect) -> Any:
        try:
            return await super().forward(effect)
        except asyncio.CancelledError:
            self.queue[effect.id] = self.later + 1
            raise

    def undo(self, effect: Effect) -> None:
        super().undo(effect)
        for key in [key for key in self.queue if key in self.world.tombs]:
            self.queue[key] -= 1
            if self.queue[key] == 0:
                self.world.add(key)


class TidiesUpOnlyIfItLives(Kept):
    """What it has not booked it frees when it is given up, or finds the tombstone; killed, it does neither."""

    async def forward(self, effect: Effect) -> Any:
        answer = self.apply(effect)
        booked = self.world.__dict__.setdefault("booked", set())
        try:
            await self.pause()
            self.apply(effect)
        except BaseException:
            if effect.id not in booked:
                self.world.held.pop(effect.id, None)
            raise
        booked.add(effect.id)
        return answer

    async def rollback(self, effect: Effect) -> None:
        await self.pause()
        self.world.tombs.add(effect.id)
        if effect.id in self.world.__dict__.setdefault("booked", set()):
            self.world.held.pop(effect.id, None)


class TombstoneFirst(Kept):
    """The tombstone is there before the effect is gone, and who finds it does nothing more."""

    async def rollback(self, effect: Effect) -> None:
        if effect.id not in self.world.tombs:
            self.world.tombs.add(effect.id)
            await self.pause()
            self.world.held.pop(effect.id, None)


class Blocks(Kept):
    def apply(self, effect: Effect) -> Any:
        time.sleep(0.55)
        return super().apply(effect)


class Down(Kept):
    async def pause(self) -> None:
        raise ConnectionRefusedError("nobody listens")


class Hangs(Kept):
    timeout_s = 0.05

    async def pause(self) -> None:
        await asyncio.sleep(60)


class RefusesAll(Kept):
    def apply(self, effect: Effect) -> Any:
        raise Refused("NO_FUNDS", "the account is empty")


class UsesUpItsDescriptor(Kept):
    def apply(self, effect: Effect) -> Any:
        effect.descriptor["lines"].pop()
        return super().apply(effect)


class DescribesByASet(Kept):
    def describe(self, run: RunFacts) -> Any:
        return {"lines": {1}}


class DescribesNothing(Kept):
    def describe(self, run: RunFacts) -> Any:
        return {"cents": run.results["prices"]["cents"]}


class Answers(Kept):
    value: Any = None

    def apply(self, effect: Effect) -> Any:
        super().apply(effect)
        return self.value


class AnswersASet(Answers):
    value = {"lines": {1}}


class AnswersNan(Answers):
    value = {"cents": math.nan}


class AnswersAList(Answers):
    value = [1]


class AnswersTooMuch(Answers):
    value = {"page": "x" * (1 << 20)}


BROKEN = [
    (NewAnswer, "repeated", "forward answered {'id': 'entry-"),
    (SilentlyTwice, "repeated", "it is to be live once, but live= counts 3"),
    (ByAttempt, "repeated", "forward answered"),
    (ByEpoch, "repeated", "forward answered"),
    (LooksFirst, "concurrent", "duplicates at the same time answered"),
    (RefusesDuplicates, "concurrent", "a duplicate at the same time raised Refused (BUSY: it is under way)"),
    (NoUndo, "rollback", "nothing of it is to be live, but live= counts 1"),
    (UndoOnce, "rollback_repeated", "rollback repeated raised LookupError: it was rolled back before"),
    (UndoneTwice, "rollback_repeated", "live= counts 2"),
    (KnownOnly, "never_applied", "rollback of an effect that was never applied raised LookupError: no such effect"),
    (NoTombstone, "tombstone", "a forward after rollback of what was never applied answered"),
    (TombstoneOfTheApplied, "tombstone", "after rollback of what was never applied answered"),
    (RefusesButApplies, "tombstone", "raised Refused (GONE: it was rolled back), nothing of it is to be live"),
    (AlwaysApplied, "status", "before anything was sent status says 'applied', it is to say 'absent'"),
    (NeverApplied, "status", "after forward had answered status says 'absent', it is to say 'applied'"),
    (
        OwnWords,
        "status",
        "status before anything was sent answered 'ABSENT'; its words are applied, absent, tombstoned",
    ),
    (NoWordForTombstones, "tombstoned", "after rollback status says 'absent', it is to say 'tombstoned'"),
    (LateRefused, "refusal", "a forward after the refused effect was rolled back answered"),
    (NoByValueError, "refusal", "raised ValueError: NO_FUNDS"),
    (ByRun, "independent", "forward after another effect was rolled back raised Refused (GONE"),
    (UndoesAll, "independent", "after"),
    (TombstoneSeenTooEarly, "overtaken", "after a rollback overtook forward at wait 1, which then answered"),
    (Swallows, "cancellation", "forward (cancelled at wait 1) still ran 1 s later"),
    (InMemory, "restart", "and after a restart"),
    (KeyFirst, "crash", "after a crash (cancelled at wait 1) and a repeat, it is to be live once, but live= counts 0"),
    (FinishesAlone, "crash_undone", "after a crash (cancelled at wait 1) of forward and a rollback, nothing"),
    (TidiesUpOnlyIfItLives, "crash_undone", "after a crash (killed at wait 1) of forward and a rollback, nothing"),
    (TombstoneFirst, "crash_rollback", "after a crash (cancelled at wait 1) of rollback and a repeat"),
    (Blocks, "loop", "forward kept the event loop to itself for 0."),
    (Down, "answers", "forward for the first time raised ConnectionRefusedError: nobody listens"),
    (Hangs, "answers", "forward for the first time gave no answer within 0.05 s"),
    (RefusesAll, "answers", "forward for the first time raised Refused (NO_FUNDS"),
    (UsesUpItsDescriptor, "descriptor", "forward made {'account': 'check-domain', 'lines': []} of"),
    (DescribesByASet, "descriptor", "which is not JSON"),
    (
        DescribesNothing,
        "descriptor",
        "describe(run) raised KeyError: 'prices'; where it needs other facts, pass facts=",
    ),
    (AnswersASet, "recordable", "which is not JSON"),
    (AnswersNan, "recordable", "which is not JSON"),
    (AnswersAList, "recordable", "which is not a mapping"),
    (AnswersTooMuch, "recordable", "at most 1048576 are kept"),
]


@pytest.mark.parametrize(("kind", "clause", "happened"), BROKEN, ids=[kind.__name__ for kind, *_ in BROKEN])
async def test_a_defect_is_named_by_its_clause_alone(kind: Any, clause: str, happened: str):
    found = await violated(kind)
    assert list(found) == [clause], found
    assert happened in found[clause]


def test_every_clause_has_a_domain_that_breaks_it():
    elsewhere = {"declared", "settled"}
    assert {clause for _, clause, _ in BROKEN} | elsewhere == set(EVERY)


async def test_what_comes_back_after_its_rollback_is_found_at_the_end():
    class FinishesLater(FinishesAlone):
        later = 4

    assert list(await violated(FinishesLater)) == ["settled"]


async def test_a_process_that_stood_still_for_the_whole_check_is_refused_too():
    """Tombstones that are kept for a while only do not outlast it."""

    class Forgets(Kept):
        def undo(self, effect: Effect) -> None:
            super().undo(effect)
            lasting = self.world.__dict__.setdefault("lasting", [])
            lasting.append(effect.id)
            if len(lasting) > 5:
                self.world.tombs.discard(lasting.pop(0))

    assert list(await violated(Forgets)) == ["settled"]


async def test_a_status_that_lies_is_caught_by_the_probe():
    class Hopeful(Kept):
        def apply(self, effect: Effect) -> Any:
            return {"queued": True}

        def says(self, effect: Effect) -> Any:
            met = [one for what, one in self.world.seen if what == "forward"]
            return TOMBSTONED if effect.id in self.world.tombs else APPLIED if effect.id in met else ABSENT

    found = await violated(Hopeful)
    assert "after forward had answered, it is to be live, but live= counts 0" in found["status"]


async def test_a_status_that_is_found_to_lie_is_not_believed_elsewhere():
    with pytest.raises(ContractViolated) as told:
        await report_of(AlwaysApplied, live=None)
    report = told.value.report
    assert names(report.violated) == ["status"]
    assert "rollback" in names(report.unchecked)


async def test_several_defects_are_told_at_once_with_what_to_do():
    class Bad(NoWordForTombstones):
        def apply(self, effect: Effect) -> Any:
            super().apply(effect)
            return {"cents": math.inf}

    with pytest.raises(ContractViolated) as told:
        await report_of(Bad)
    text = str(told.value)
    assert text.startswith("the participant contract of domain 'kept' (EXTERNAL), seed s: 2 violated, 0 not checked, ")
    assert "violated: recordable: what forward returns is a mapping of JSON, or None" in text
    assert "violated: tombstoned: status says tombstoned after a rollback" in text
    assert text.count("what happened: ") == text.count("what to do: ") == 2
    assert isinstance(told.value, SpineError)


def test_the_error_survives_pickling():
    with pytest.raises(ContractViolated) as told:
        asyncio.run(check_domain(object()))
    again = pickle.loads(pickle.dumps(told.value))
    assert (str(again), again.report) == (str(told.value), told.value.report)


async def test_the_report_reads_as_a_list():
    lines = str(await report_of(Kept, refused=None)).splitlines()
    assert lines[0].endswith("0 violated, 1 not checked, 21 passed:")
    assert lines[1].startswith("  not checked: refusal: ")
    assert lines[2].startswith("    because: no completion is known that the domain refuses")
    assert lines[3].startswith("  passed: declared: ")


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


# -- declarations


class Sync(Kept):
    def forward(self, effect: Effect) -> Any:  # type: ignore[override]
        return {}


class NoArgument(Kept):
    async def rollback(self) -> None:  # type: ignore[override]
        pass


class NoRollback(Kept):
    rollback = None  # type: ignore[assignment]


class NoTime(Kept):
    timeout_s = 0.0


@pytest.mark.parametrize(
    ("domain", "happened"),
    [
        (Kept, "pass an instance of it"),
        (Sync(World()), "must be `async def`"),
        (NoArgument(World()), "rollback cannot be called with one argument"),
        (NoRollback(World()), "RollbackNotSupportedError"),
        (NoTime(World()), "timeout_s 0.0 must be more than 0"),
        (object(), "has no name"),
        (BUILT_INS[0], "it is built in"),
    ],
)
async def test_what_cannot_take_part_is_refused_before_it_is_called(domain: object, happened: str):
    with pytest.raises(ContractViolated, match="declared") as told:
        await check_domain(domain)
    assert happened in told.value.report.violated[0].detail


# -- waits that end


async def test_a_probe_that_fails_is_the_checks_own_fault():
    async def live(effect: Effect) -> int:
        raise LookupError("no such table")

    with pytest.raises(ConfigurationError, match=r"live= failed for effect .*no such table"):
        await check_domain(Kept(World()), live=live)


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
