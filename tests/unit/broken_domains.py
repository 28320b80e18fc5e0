"""Domains that each break one clause of the contract of participants, and what the check says happened."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from typing import Any

from spine.domains import Refused, RunFacts
from spine.effects import ABSENT, APPLIED, TOMBSTONED, Effect
from tests.unit.kept_domain import Kept, World


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
