"""Calls to domains outside: each in an owned task with its own deadline, and every ending an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from spine.domains import Refused
from spine.effects import CANCEL_GRACE_S, Effect
from spine.governance.failpoints import Failpoint, of_call
from spine.kernel.errors import Overloaded, describe
from spine.kernel.exchange import Exchange
from spine.kernel.tasks import Tasks

# Of one kind, such as the rollbacks of one domain, so many at a time: whose calls hang keeps nobody else's waiting.
CALLS_MOST: Final = 1024

Method = Callable[[Effect], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Answered:
    """The domain's method returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No answer, or one that says nothing about the effect: it may have happened."""

    code: str
    error: str
    cause: BaseException | None = None


Answer = Answered | Refused | Unanswered


@dataclass(frozen=True, slots=True)
class _Kind:
    """The calls of one method of one domain, or of the publisher, those left behind among them."""

    tasks: Tasks
    room: asyncio.Semaphore


class EffectCalls:
    """Calls domains outside for one coordinator."""

    def __init__(
        self, exchange: Exchange, failpoint: Failpoint, on_crash: Callable[[str, BaseException], None]
    ) -> None:
        self._exchange = exchange
        self._failpoint = failpoint
        self._on_crash = on_crash
        self._kinds: dict[str, _Kind] = {}

    async def call(self, name: str, what: str, method: Method, effect: Effect) -> Answer:
        """Call ``method`` of domain ``name`` until ``effect.deadline``; never raises what the domain raises."""
        return await self.run(f"{what} of domain {name!r}", of_call(what), partial(method, effect), effect.deadline)

    async def run(self, label: str, moment: str, work: Callable[[], Awaitable[Any]], deadline: float) -> Answer:
        """Run foreign code until ``deadline`` (monotonic seconds); what will not end then is left behind.

        Of one ``label`` at most ``CALLS_MOST`` run at a time, those left behind among them; the next one waits its turn
        until ``deadline``.
        """
        await self._failpoint(f"{moment}.before")
        kind = self._kind(label)
        if not await self._room(kind, deadline):
            error = Overloaded(f"{CALLS_MOST} calls of {label} have not ended: it was not called")
            return Unanswered("OVERLOADED", str(error), error)
        running = _Running(self._exchange, deadline)
        running.task = kind.tasks.spawn(running.run(work), label, kind.room.release)
        self._exchange.deadlines.add(deadline, running)
        try:
            await running.ended
        except asyncio.CancelledError:
            running.task.cancel()
            raise
        finally:
            self._exchange.deadlines.discard(running.deadline, running)
        await self._failpoint(f"{moment}.after")
        return running.answer(label)

    async def stop(self, seconds: float) -> bool:
        """Cancel what still runs and wait at most ``seconds``; ``False`` when one refuses to end."""
        ended = await asyncio.gather(*(kind.tasks.cancel(seconds) for kind in self._kinds.values()))
        return all(ended)

    def _kind(self, label: str) -> _Kind:
        found = self._kinds.get(label)
        if found is None:
            tasks = Tasks(label, limit=CALLS_MOST, on_crash=self._on_crash)
            found = self._kinds[label] = _Kind(tasks, asyncio.Semaphore(CALLS_MOST))
        return found

    async def _room(self, kind: _Kind, deadline: float) -> bool:
        """Take room for one call, as soon as there is some; ``False`` when there is none until ``deadline``."""
        if not kind.room.locked():
            return await kind.room.acquire()
        try:
            with self._exchange.deadlines.limit(max(deadline - self._exchange.clock.monotonic(), 0.0)):
                return await kind.room.acquire()
        except TimeoutError:
            return False


class _Running:
    """One call under way; expired by the deadline wheel."""

    def __init__(self, exchange: Exchange, deadline: float) -> None:
        self._exchange = exchange
        self.deadline = deadline
        self.ended: asyncio.Future[None] = exchange.loop.create_future()
        self.task: asyncio.Task[None] | None = None
        self._allowed = deadline - exchange.clock.monotonic()
        self._late = False
        self._value: Any = None
        self._error: BaseException | None = None

    async def run(self, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            self._value = await work()
        except BaseException as error:  # noqa: BLE001  a domain is foreign code: its failure is an answer
            self._error = error
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def expire(self) -> None:
        """The deadline passed: cancel the call, and if it will not end, go on without it."""
        if self._late:
            self._error = self._error or TimeoutError("it swallowed its cancellation and still runs")
            self._end()
            return
        self._late = True
        assert self.task is not None
        self.task.cancel()
        self.deadline = self._exchange.clock.monotonic() + CANCEL_GRACE_S
        self._exchange.deadlines.add(self.deadline, self)

    def answer(self, label: str) -> Answer:
        error = self._error
        if self._late and not isinstance(error, Refused):
            detail = f" ({error})" if isinstance(error, TimeoutError) and str(error) else ""
            return Unanswered(
                "TIMEOUT",
                f"{label} gave no answer within {round(self._allowed, 2):g} s{detail}",
                error,
            )
        if error is None:
            return Answered(self._value)
        if isinstance(error, Refused):
            return error
        if isinstance(error, asyncio.CancelledError):
            return Unanswered("CANCELLED", f"{label} was cancelled", error)
        return Unanswered(type(error).__name__, describe(error), error)
