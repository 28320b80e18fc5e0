"""One call of a domain's method, in a task of its own: watched where it waits, and there cut off or held up."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from spine.domains import Refused
from spine.effects import CANCEL_GRACE_S, Effect
from spine.kernel.clock import SystemClock
from spine.kernel.errors import describe

Method = Callable[[Effect], Coroutine[Any, Any, Any]]


@dataclass(frozen=True, slots=True)
class Answered:
    """The method returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The method raised what is no business no: nobody knows whether the effect happened."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Late:
    """No answer came within ``seconds``."""

    seconds: float


Ending = Answered | Refused | Failed | Late


def told(ending: Ending) -> str:
    """The ending in words."""
    match ending:
        case Answered():
            return f"answered {ending.value!r:.200}"
        case Refused():
            return f"raised Refused ({ending})"
        case Failed():
            return f"raised {describe(ending.error)}"
        case Late():
            return f"gave no answer within {ending.seconds:g} s"


class Call:
    """A call under way.

    ``cut_at`` cancels it at that wait (from 1), as a crash would end it there; ``hold_at`` lets it go no further than
    that wait until ``release``. ``waits`` counts how often it waited, ``held_s`` is the longest it kept the event loop.
    """

    def __init__(self, method: Method, effect: Effect, *, cut_at: int = 0, hold_at: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self.effect = effect
        self.waits = 0
        self.held_s = 0.0
        self._cut_at = cut_at
        self._hold_at = hold_at
        self._reached: asyncio.Future[None] = loop.create_future()
        self._released = asyncio.Event()
        self._ending: Ending | None = None
        self.task = loop.create_task(self._run(method, effect))

    @property
    def still_runs(self) -> bool:
        """Whether it has not ended, whatever was done to end it."""
        return self._ending is None

    async def end(self, timeout_s: float) -> Ending:
        """How it ends; after ``timeout_s`` seconds it is cancelled, and left behind if it swallows that."""
        await asyncio.wait({self.task}, timeout=timeout_s)
        if self._ending is not None:
            return self._ending
        await self.cut()
        return Late(timeout_s)

    async def cut(self) -> None:
        """Cancel it, once, and give it the time to end that Spine would give it."""
        if not self.task.cancelling():
            self.task.cancel()
        await asyncio.wait({self.task}, timeout=CANCEL_GRACE_S)

    async def reached(self, timeout_s: float) -> bool:
        """Whether it came to the wait at which it is cut or held; ``False`` when it ended before that."""
        await asyncio.wait({self.task, self._reached}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return self._reached.done()

    def release(self) -> None:
        """Let a held call go on."""
        self._released.set()

    async def _run(self, method: Method, effect: Effect) -> None:
        try:
            self._ending = Answered(await self._stepwise(method(effect)))
        except Refused as refused:
            self._ending = refused
        except BaseException as error:  # noqa: BLE001  a domain is foreign code: whatever it raises is its ending
            self._ending = Failed(error)

    @types.coroutine
    def _stepwise(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Drive ``work`` from wait to wait; whatever it waits for is handed on to the event loop."""
        now = SystemClock.monotonic
        resume: Callable[[], Any] = partial(work.send, None)
        while True:
            began = now()
            try:
                waits_for = resume()
            except StopIteration as end:
                return end.value
            finally:
                self.held_s = max(self.held_s, now() - began)
            self.waits += 1
            if self.waits == self._cut_at:
                self._reached.set_result(None)
                this = asyncio.current_task()
                assert this is not None
                this.cancel()
            try:
                value = yield waits_for
                if self.waits == self._hold_at:
                    self._reached.set_result(None)
                    yield from _waiting(self._released.wait())
            except BaseException as error:  # noqa: BLE001  the loop's word to the work, a cancellation above all
                resume = partial(work.throw, error)
            else:
                resume = partial(work.send, value)


def _waiting(work: Awaitable[Any]) -> Generator[Any, Any, Any]:
    return work.__await__()
