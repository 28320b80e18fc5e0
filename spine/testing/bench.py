"""A domain on the bench: effects of its own, calls repeated as Spine repeats them, and who sees the other system."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import NAMESPACE_OID, uuid5

from spine.domains import RunFacts, effect_id
from spine.effects import APPLIED, STATUSES, Effect, attempts_of, timeout_of
from spine.governance.recordable import recorded
from spine.governance.transactions import DomainClass
from spine.kernel.clock import SystemClock
from spine.kernel.errors import ConfigurationError, SpineError, describe
from spine.kernel.restart import backoff
from spine.parts import part_of
from spine.settings import Retry
from spine.testing.calls import Answered, Call, Ending, Failed, Late, told

PROBE_S: Final = 10.0
# A check repeats sooner than Spine does: it waits for lost replies, not for systems that are down.
PAUSE_FIRST_S: Final = 0.02
PAUSE_MOST_S: Final = 0.5
UNSEEN: Final = "nobody saw what the other system holds: pass live="
STATUS_TOO: Final = ", or give the domain an `async status(effect)` that is right"
UNCOUNTED: Final = (
    "nobody saw whether it happened once or twice: let live= return how many effects of this id there are"
)
ANEW: Final = "let it return the domain made anew: another object, of the same name, that takes part in the same way"

Live = Callable[[Effect], Awaitable[int]]


class Broken(SpineError):
    """A clause does not hold; the text says what happened."""


class Unseen(SpineError):
    """A clause cannot be checked; the text says why."""


@dataclass(slots=True)
class Bench:
    """One domain under check.

    ``facts`` are those of the completions it takes part in, each of a run of its own where the bench ``names_runs``;
    ``refused``, ``live`` and ``restarted`` are as for ``check_domain``. What is measured is by method: how often it
    waits, its longest way to an answer and its longest hold of the event loop, both in seconds.
    """

    domain: Any
    cls: DomainClass
    seed: str
    facts: RunFacts
    names_runs: bool
    refused: RunFacts | None
    live: Live | None
    restarted: Callable[[], object] | None
    trusts_status: bool = False
    waits: dict[str, int] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)
    held_s: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    touched: dict[str, Effect] = field(default_factory=dict)
    sound: dict[str, Effect] = field(default_factory=dict)
    left: dict[str, Effect] = field(default_factory=dict)
    undone_ids: set[str] = field(default_factory=set)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _sent: dict[str, int] = field(default_factory=dict)
    _calls: set[Call] = field(default_factory=set)

    @property
    def timeout_s(self) -> float:
        """How long one call may take, in seconds."""
        return timeout_of(self.domain)

    @property
    def sees(self) -> bool:
        """Whether anybody tells what the other system holds."""
        return self.live is not None or self.trusts_status

    def has(self, *methods: str) -> list[str]:
        """Which of the methods the domain has; all of a domain outside unless some are named."""
        return [
            m for m in methods or ("forward", "rollback", "status", "post") if callable(getattr(self.domain, m, None))
        ]

    @property
    def act(self) -> str:
        """The method that has the effect."""
        return "post" if self.cls is DomainClass.POST else "forward"

    # -- effects

    def completion(self, facts: RunFacts | None = None) -> RunFacts:
        """The facts of one more completion: under a transaction of its own."""
        number = next(self._numbers)
        tx_id = str(uuid5(NAMESPACE_OID, f"{self.seed}:{number}"))
        if facts is None:
            facts = replace(self.facts, run_id=f"{self.facts.run_id}-{number}") if self.names_runs else self.facts
        return replace(facts, tx_id=tx_id, effect_id=effect_id(tx_id, self.domain.name))

    def effect(self, facts: RunFacts | None = None) -> Effect:
        """What the domain is to do in one more completion. Raises Broken when that cannot be recorded."""
        run = self.completion(facts)
        describe_it = getattr(self.domain, "describe", None)
        try:
            given = run.descriptor() if describe_it is None else describe_it(run)
        except Exception as error:
            raise Broken(f"describe(run) raised {describe(error)}; where it needs other facts, pass facts=") from error
        try:
            descriptor = recorded(given)
        except (TypeError, ValueError) as error:
            raise Broken(f"the effect is described by {given!r:.200}, which {error}") from error
        return Effect(run.effect_id, run.tx_id, run.run_id, run.tenant_id, 1, 1, 0.0, descriptor)

    # -- calls

    def another(self) -> object:
        """The domain as a process that recovers has it: made anew, where ``restarted`` says how.

        Raises ConfigurationError where that gives no such domain: the check would try the old one in its place.
        """
        if self.restarted is None:
            return self.domain
        try:
            made = self.restarted()
            part = part_of(made)
        except ConfigurationError as error:
            raise ConfigurationError(f"restarted= gave no domain: {error}; {ANEW}") from error
        except Exception as error:
            raise ConfigurationError(f"restarted= failed: {describe(error)}; {ANEW}") from error
        if made is self.domain:
            raise ConfigurationError(f"restarted= gave the very object that is checked; {ANEW}")
        if (part.name, part.cls) != (self.domain.name, self.cls):
            raise ConfigurationError(f"restarted= gave {part.cls.value} domain {part.name!r}; {ANEW}")
        return made

    def start(self, what: str, effect: Effect, *, by: object = None, cut_at: int = 0, hold_at: int = 0) -> Call:
        """Begin one call; each is another attempt, under another fencing token."""
        self.touched[effect.id] = self.left[effect.id] = effect
        sent = self._sent[effect.id] = self._sent.get(effect.id, 0) + 1
        deadline = SystemClock.monotonic() + self.timeout_s
        sent_effect = replace(
            effect, epoch=sent, attempt=sent, deadline=deadline, descriptor=recorded(effect.descriptor)
        )
        domain = self.domain if by is None else by
        call = Call(getattr(domain, what), sent_effect, cut_at=cut_at, hold_at=hold_at)
        self._calls.add(call)
        call.task.add_done_callback(lambda _: self._calls.discard(call))
        return call

    async def end(self, what: str, call: Call) -> Ending:
        """How a call ends."""
        began = SystemClock.monotonic()
        ending = await call.end(self.timeout_s)
        self.held_s[what] = max(self.held_s.get(what, 0.0), call.held_s)
        if isinstance(ending, Answered):
            self.waits[what] = max(self.waits.get(what, 0), call.waits)
            self.took_s[what] = max(self.took_s.get(what, 0.0), SystemClock.monotonic() - began)
        return ending

    async def ask(self, what: str, effect: Effect, *, by: object = None) -> Ending:
        """Call a method until it answers or its attempts are used up, as Spine does."""
        attempts = attempts_of(self.domain) if what == "forward" else Retry().attempts
        attempt = 1
        while isinstance(ending := await self.end(what, self.start(what, effect, by=by)), (Failed, Late)):
            if attempt == attempts:
                break
            await asyncio.sleep(backoff(attempt, first_s=PAUSE_FIRST_S, most_s=PAUSE_MOST_S, jitter=0.0))
            attempt += 1
        return ending

    async def applied(self, effect: Effect, when: str, *, by: object = None) -> Any:
        """What the domain answers to the effect, as it is recorded. Raises Broken when it does not answer."""
        ending = await self.ask(self.act, effect, by=by)
        if not isinstance(ending, Answered):
            raise Broken(f"effect {effect.id}: {self.act} {when} {told(ending)}")
        return answer_of(ending)

    async def undone(self, effect: Effect, when: str, *, by: object = None) -> None:
        """Have the effect rolled back. Raises Broken when that is not accepted."""
        ending = await self.ask("rollback", effect, by=by)
        if not isinstance(ending, Answered):
            raise Broken(f"effect {effect.id}: rollback {when} {told(ending)}")
        self.undone_ids.add(effect.id)

    async def status(self, effect: Effect, when: str) -> str:
        """What the domain's ``status`` says. Raises Broken when that is none of its words."""
        ending = await self.ask("status", effect)
        if not isinstance(ending, Answered) or ending.value not in STATUSES:
            raise Broken(f"effect {effect.id}: status {when} {told(ending)}; its words are {', '.join(STATUSES)}")
        return str(ending.value)

    async def awake(self) -> None:
        """Let every call that is held up go on to its end."""
        for call in list(self._calls):
            call.release()
            await call.end(self.timeout_s)

    async def close(self) -> None:
        """End every call that is under way, and roll back what is left, as far as that goes."""
        for call in list(self._calls):
            await call.cut()
        if self.cls is DomainClass.EXTERNAL:
            for effect in list(self.left.values()):
                if not isinstance(await self.ask("rollback", effect), Answered):
                    break

    # -- who sees

    async def expect(self, effect: Effect, when: str, *, live: bool, once: bool = False) -> None:
        """Raise Broken unless the effect is live, or is not; note where nobody can tell."""
        wanted = f"it is to be live{' once' if once else ''}" if live else "nothing of it is to be live"
        if self.live is not None:
            found = await self._probe(effect)
            if (found > 0) != live or (once and found > 1):
                raise Broken(f"effect {effect.id}: {when}, {wanted}, but live= counts {int(found)}")
            if once and isinstance(found, bool):
                self.notes.append(UNCOUNTED)
        elif self.trusts_status:
            word = await self.status(effect, when)
            if (word == APPLIED) != live:
                raise Broken(f"effect {effect.id}: {when}, {wanted}, but status says {word!r}")
            if once:
                self.notes.append(UNCOUNTED)
        else:
            self.notes.append(UNSEEN + ("" if self.cls is DomainClass.POST else STATUS_TOO))

    async def _probe(self, effect: Effect) -> int:
        assert self.live is not None
        try:
            async with asyncio.timeout(PROBE_S):
                found: object = await self.live(effect)
        except Exception as error:
            raise ConfigurationError(f"live= failed for effect {effect.id}: {describe(error)}: mend it") from error
        if not isinstance(found, int) or found < 0:
            raise ConfigurationError(
                f"live= gave {found!r:.200} for effect {effect.id}: let it return how many there are, an integer"
            )
        return found


def answer_of(answer: Answered) -> Any:
    """The answer as it is recorded, or as it is where it cannot be."""
    try:
        return recorded({} if answer.value is None else answer.value)
    except (TypeError, ValueError):
        return answer.value
