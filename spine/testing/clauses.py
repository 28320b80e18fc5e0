"""What is tried on a domain outside, clause by clause: each a function of the bench that raises Broken or Unseen."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from spine.domains import Refused
from spine.effects import ABSENT, APPLIED, CANCEL_GRACE_S, TOMBSTONED, Effect
from spine.governance.recordable import recorded
from spine.settings import Settings
from spine.testing.bench import Bench, Broken, Unseen, answer_of
from spine.testing.calls import Answered, Call, told

# What Spine's watchdog reports by default.
BLOCKED_S: Final = Settings().blocked_s
DUPLICATES: Final = 4
CUTS_MOST: Final = 48
# Where between its start and its usual end a call is cut off, besides at each of its waits.
SHARES: Final = (0.2, 0.5, 0.8)


# -- what is sent and what comes back


async def descriptor(bench: Bench) -> None:
    """The descriptor is JSON, and no call changes it: who recovers has the recorded one."""
    effect = bench.effect()
    for what in bench.has():
        call = bench.start(what, effect)
        await bench.end(what, call)
        if call.effect.descriptor != effect.descriptor:
            raise Broken(f"{what} made {call.effect.descriptor!r:.200} of {effect.descriptor!r:.200}")


async def answers(bench: Bench) -> None:
    """A first call answers."""
    await bench.applied(bench.effect(), "for the first time")


async def recordable(bench: Bench) -> None:
    """The answer is a mapping or None, and JSON."""
    ending = await bench.ask("forward", bench.effect())
    if isinstance(ending, Answered) and ending.value is not None:
        try:
            recorded(ending.value)
        except (TypeError, ValueError) as error:
            raise Broken(f"forward answered {ending.value!r:.200}, which {error}") from error


async def loop(bench: Bench) -> None:
    """No call keeps the event loop to itself; the better of two tries counts, for a machine may be busy."""
    effect = bench.effect()
    for what in bench.has():
        held_s = []
        for _ in range(2):
            bench.held_s.pop(what, None)
            await bench.ask(what, effect)
            held_s.append(bench.held_s[what])
        if (seconds := min(held_s)) >= BLOCKED_S:
            raise Broken(f"{what} kept the event loop to itself for {seconds:.1f} s")


# -- forward


async def status(bench: Bench) -> None:
    """``status`` knows what has not happened from what has."""
    if not bench.has("status"):
        raise Unseen("the domain has no status(effect), which is optional")
    effect = bench.effect()
    for when, word in (("before anything was sent", ABSENT), ("after forward had answered", APPLIED)):
        if word is APPLIED:
            await bench.applied(effect, "for the first time")
        if (said := await bench.status(effect, when)) != word:
            raise Broken(f"effect {effect.id}: {when} status says {said!r}, it is to say {word!r}")
        if bench.live is not None:
            await bench.expect(effect, when, live=word is APPLIED)
    bench.trusts_status = True


async def repeated(bench: Bench) -> None:
    """The same effect again changes nothing and answers the same."""
    effect = bench.effect()
    first = await bench.applied(effect, "for the first time")
    for _ in range(2):
        again = await bench.applied(effect, "repeated with the same effect id")
        if again != first:
            raise Broken(f"effect {effect.id}: {bench.act} answered {first!r:.200}, and repeated {again!r:.200}")
    await bench.expect(effect, f"after {bench.act} was repeated", live=True, once=True)


async def concurrent(bench: Bench) -> None:
    """Duplicates under way at the same time are one effect; a duplicate may fail, but not say otherwise."""
    effect = bench.effect()
    # Of processes of their own, where that can be: a lock within one keeps no other out.
    calls = [bench.start(bench.act, effect, by=bench.another()) for _ in range(DUPLICATES)]
    endings = [await bench.end(bench.act, call) for call in calls]
    said = [answer_of(ending) for ending in endings if isinstance(ending, Answered)]
    said.append(await bench.applied(effect, "after duplicates"))
    for other in said[1:]:
        if other != said[0]:
            raise Broken(
                f"effect {effect.id}: duplicates at the same time answered {said[0]!r:.200} and {other!r:.200}"
            )
    for ending in endings:
        if isinstance(ending, Refused):
            raise Broken(f"effect {effect.id}: it was applied, but a duplicate at the same time {told(ending)}")
    await bench.expect(effect, "after duplicates at the same time", live=True, once=True)


# -- rollback


async def rollback(bench: Bench) -> None:
    """A rollback undoes, and may come again."""
    effect = bench.effect()
    await bench.applied(effect, "for the first time")
    await bench.undone(effect, "of an applied effect")
    await bench.expect(effect, "after rollback", live=False)


async def never_applied(bench: Bench) -> None:
    """A rollback of what never happened is accepted."""
    effect = bench.effect()
    await bench.undone(effect, "of an effect that was never applied")
    if bench.sees:
        await bench.expect(effect, "after rollback of what was never applied", live=False)


async def rollback_repeated(bench: Bench) -> None:
    """A rollback that comes again is accepted and changes nothing."""
    for before in (True, False):
        effect = bench.effect()
        if before:
            await bench.applied(effect, "for the first time")
        for when in ("for the first time", "repeated", "repeated"):
            await bench.undone(effect, when)
        await bench.expect(effect, "after rollback was repeated", live=False)


async def tombstone(bench: Bench) -> None:
    """A forward that comes after the rollback does not apply, whether or not one came before it."""
    for before in (False, True):
        effect = bench.effect()
        if before:
            await bench.applied(effect, "for the first time")
        await bench.undone(effect, "before a late forward")
        await _stays_away(bench, effect, "after rollback" if before else "after rollback of what was never applied")


async def tombstoned(bench: Bench) -> None:
    """``status`` knows the tombstone, which keeps recovery from sending once more."""
    if not bench.has("status"):
        raise Unseen("the domain has no status(effect), which is optional")
    for before in (False, True):
        effect = bench.effect()
        if before:
            await bench.applied(effect, "for the first time")
        await bench.undone(effect, "before status was asked")
        if (said := await bench.status(effect, "after rollback")) != TOMBSTONED:
            raise Broken(f"effect {effect.id}: after rollback status says {said!r}, it is to say {TOMBSTONED!r}")


async def refusal(bench: Bench) -> None:
    """A refused effect can be rolled back and then stays away: the network may still deliver its duplicate."""
    if bench.refused is None:
        raise Unseen("no completion is known that the domain refuses: pass its facts as refused=")
    effect = bench.effect(bench.refused)
    ending = await bench.ask("forward", effect)
    if not isinstance(ending, Refused):
        raise Broken(f"effect {effect.id}: forward of what refused= says is refused {told(ending)}")
    await bench.undone(effect, "of a refused effect")
    await _stays_away(bench, effect, "after the refused effect was rolled back")


async def independent(bench: Bench) -> None:
    """Another effect, even of the same run, is not touched."""
    for same_run in (True, False):
        one = bench.effect()
        other = bench.effect(replace(bench.facts, run_id=one.run_id) if same_run else None)
        first = await bench.applied(other, "beside another effect")
        await bench.applied(one, "beside another effect")
        await bench.undone(one, "beside another effect")
        again = await bench.applied(other, "after another effect was rolled back")
        if again != first:
            raise Broken(
                f"effect {other.id}: forward answered {first!r:.200}, and {again!r:.200} after {one.id} was rolled back"
            )
        await bench.expect(other, f"after {one.id} was rolled back", live=True)


async def overtaken(bench: Bench) -> None:
    """A rollback that overtakes a forward under way wins, wherever that forward is held up."""
    for at in _waits(bench, "forward"):
        effect = bench.effect()
        call = bench.start("forward", effect, hold_at=at)
        held = await call.reached(bench.timeout_s)
        try:
            await bench.undone(effect, f"while forward was held up at wait {at}", by=bench.another())
        except Broken as broken:
            if bench.restarted is not None:
                raise
            why = f"{broken}; if it waits for that forward, pass restarted=: the next process has no lock of it"
            raise Unseen(why) from broken
        finally:
            call.release()
        ending = await bench.end("forward", call)
        if held:
            when = f"after a rollback overtook forward at wait {at}, which then {told(ending)}"
            await bench.expect(effect, when, live=False)


# -- crashes


async def cancellation(bench: Bench) -> None:
    """A call that is given up ends."""
    waiting = [what for what in bench.has() if bench.waits.get(what)]
    if not waiting:
        raise Unseen("no call waits for anything: there was nothing to give up")
    for what, cut in [(method, cut) for method in waiting for cut in _cuts(bench, method)]:
        if (await _cut_off(bench, what, bench.effect(), cut)).still_runs:
            raise Broken(f"{what} {cut} still ran {CANCEL_GRACE_S:g} s later")


async def restart(bench: Bench) -> None:
    """What was done is known to the other system, not to this process alone."""
    if bench.restarted is None:
        raise Unseen("the domain was not made anew: pass restarted=, which makes it as the next process would")
    effect = bench.effect()
    first = await bench.applied(effect, "for the first time")
    again = await bench.applied(effect, "after a restart", by=bench.another())
    if again != first:
        raise Broken(f"effect {effect.id}: {bench.act} answered {first!r:.200}, and after a restart {again!r:.200}")
    await bench.expect(effect, "after a restart", live=True, once=True)
    if bench.has("rollback"):
        await bench.undone(effect, "after a restart", by=bench.another())
        await _stays_away(bench, effect, "after a restart", by=bench.another())


async def crash(bench: Bench) -> None:
    """An effect whose process crashed in the middle is taken up by the next one."""
    for cut in [*_cuts(bench, bench.act), *_kills(bench, bench.act)]:
        effect = bench.effect()
        await _cut_off(bench, bench.act, effect, cut)
        when = f"after a crash {cut}"
        said = await bench.applied(effect, when, by=bench.another())
        again = await bench.applied(effect, f"{when}, repeated", by=bench.another())
        if again != said:
            raise Broken(f"effect {effect.id}: {bench.act} {when} answered {said!r:.200}, and repeated {again!r:.200}")
        await bench.expect(effect, f"{when} and a repeat", live=True, once=True)


async def crash_undone(bench: Bench) -> None:
    """An effect whose process crashed in the middle can be rolled back, and stays away."""
    for cut in [*_cuts(bench, "forward"), *_kills(bench, "forward")]:
        effect = bench.effect()
        await _cut_off(bench, "forward", effect, cut)
        await bench.undone(effect, f"after a crash {cut} of forward", by=bench.another())
        await bench.expect(effect, f"after a crash {cut} of forward and a rollback", live=False)
        await _stays_away(bench, effect, f"after a crash {cut} of forward and a rollback")


async def crash_rollback(bench: Bench) -> None:
    """A rollback whose process crashed in the middle is repeated by the next one."""
    for cut in [*_cuts(bench, "rollback"), *_kills(bench, "rollback")]:
        effect = bench.effect()
        await bench.applied(effect, "for the first time")
        await _cut_off(bench, "rollback", effect, cut)
        await bench.undone(effect, f"after a crash {cut} of rollback", by=bench.another())
        await bench.expect(effect, f"after a crash {cut} of rollback and a repeat", live=False)
        await _stays_away(bench, effect, f"after a crash {cut} of rollback and a repeat")


async def settled(bench: Bench) -> None:
    """What was rolled back is still gone at the end, whatever was under way has arrived."""
    sound = list(bench.sound.values())
    await bench.awake()
    for effect in sound:
        if effect.id in bench.undone_ids:
            await bench.expect(effect, "at the end of the check", live=False)
    for effect in sound:
        await bench.undone(effect, "at the end of the check")
        await bench.expect(effect, "after rollback at the end of the check", live=False)
        bench.left.pop(effect.id)


# -- what they share


async def _stays_away(bench: Bench, effect: Effect, when: str, *, by: object = None) -> None:
    """Send a forward that comes too late: it may say what it will, but not apply."""
    ending = await bench.ask("forward", effect, by=by)
    if isinstance(ending, Answered) or bench.sees:
        await bench.expect(effect, f"a forward {when} {told(ending)}", live=False)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a call is cut off: at its wait ``at`` (from 1), or after ``seconds``; ``killed``, it cleans nothing up."""

    at: int = 0
    seconds: float = 0.0
    killed: bool = False

    def __str__(self) -> str:
        how = "killed" if self.killed else "cancelled"
        return f"({how} at wait {self.at})" if self.at else f"({how} after {self.seconds * 1e3:.1f} ms)"


async def _cut_off(bench: Bench, what: str, effect: Effect, cut: _Cut) -> Call:
    """Begin a call and cut it off; where it was cancelled it is given the time to end."""
    if cut.killed:
        call = bench.start(what, effect, by=bench.another(), hold_at=cut.at)
        await call.reached(bench.timeout_s)
        return call
    call = bench.start(what, effect, cut_at=cut.at)
    if cut.at:
        await call.reached(bench.timeout_s)
    else:
        await asyncio.wait({call.task}, timeout=cut.seconds)
    await call.cut()
    return call


def _waits(bench: Bench, what: str) -> list[int]:
    """The waits of a method at which it is cut off or held up."""
    waits = bench.waits.get(what, 0)
    if waits == 0:
        raise Unseen(f"{what} never waits for anything: there is no moment in its middle")
    if waits <= CUTS_MOST:
        return list(range(1, waits + 1))
    bench.notes.append(f"{what} waits {waits} times: only {CUTS_MOST} of them were tried")
    return [1 + n * waits // CUTS_MOST for n in range(CUTS_MOST)]


def _cuts(bench: Bench, what: str) -> list[_Cut]:
    shares = [_Cut(seconds=share * bench.took_s.get(what, 0.0)) for share in SHARES]
    return [*(_Cut(at) for at in _waits(bench, what)), *shares]


def _kills(bench: Bench, what: str) -> list[_Cut]:
    """A killed call stands still where it waited: only a domain made anew knows nothing of it."""
    if bench.restarted is None:
        bench.notes.append("a process that is killed, and cleans nothing up, was not tried: pass restarted=")
        return []
    return [_Cut(at, killed=True) for at in _waits(bench, what)]
