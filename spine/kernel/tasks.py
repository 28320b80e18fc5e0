"""Owned tasks: work that outlasts one message, bounded, and ended with its owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio

from spine.kernel.clock import Clock
from spine.kernel.errors import ActorCrashed, Overloaded, SpineError, describe
from spine.kernel.messages import Envelope


class Tasks:
    """Runs coroutines as tasks of one owner, at most ``limit`` at a time.

    ``on_crash`` hears of a task that ended with an exception: nothing is swallowed.
    """

    def __init__(self, owner: str, *, limit: int, on_crash: Callable[[str, BaseException], None]) -> None:
        self._owner = owner
        self._limit = limit
        self._on_crash = on_crash
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(
        self, work: Coroutine[Any, Any, None], name: str = "", on_end: Callable[[], None] | None = None
    ) -> asyncio.Task[None]:
        """Start the work, named if that is worth it, and call ``on_end`` after; raises ``Overloaded`` at the limit."""
        if len(self._tasks) >= self._limit:
            work.close()
            raise Overloaded(f"{self._owner} runs {self._limit} tasks already: ask again later")
        task = self._loop.create_task(work)
        if name:
            task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._ended if on_end is None else partial(self._ended, on_end=on_end))
        return task

    def answer(self, envelope: Envelope, work: Coroutine[Any, Any, Any]) -> None:
        """Answer an ask with what the work returns or raises, in a task of its own."""

        async def reply() -> None:
            try:
                envelope.reply(await work)
            except SpineError as error:
                envelope.fail(error)
            except Exception as error:
                msg_id = str(envelope.exchange.tracer.msg_id(envelope.number))
                envelope.fail(ActorCrashed(self._owner, msg_id, 0, describe(error)))
                raise

        try:
            self.spawn(reply(), type(envelope.payload).__name__)
        except Overloaded as error:
            work.close()
            envelope.fail(error)

    def _ended(self, task: asyncio.Task[None], on_end: Callable[[], None] | None = None) -> None:
        self._tasks.discard(task)
        if on_end is not None:
            on_end()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(task.get_name(), error)

    async def every(
        self, seconds: float, look: Callable[[], Coroutine[Any, Any, None]], name: str, clock: Clock
    ) -> None:
        """Look again and again until cancelled, each time in a task of its own: a look that fails ends alone."""
        while True:
            try:
                looking = self.spawn(look(), name)
            except Overloaded as error:
                self._on_crash(name, error)
            else:
                try:
                    await asyncio.wait([looking])
                except asyncio.CancelledError:
                    looking.cancel()
                    raise
            await clock.sleep_until(clock.monotonic() + seconds)

    def __len__(self) -> int:
        return len(self._tasks)

    async def drained(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for all to end; tells whether they did."""
        with anyio.move_on_after(seconds):
            while self._tasks:
                await asyncio.wait(list(self._tasks))
        return not self._tasks

    async def cancel(self, seconds: float) -> bool:
        """Cancel all and wait at most ``seconds``; ``False`` when one refuses to end."""
        for task in list(self._tasks):
            task.cancel()
        return await self.drained(seconds)


def cancelling() -> bool:
    """Whether the current task is asked to end: else a ``CancelledError`` in it is somebody else's."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
