"""Owned tasks: work that outlasts one message, bounded, and ended with its owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from spine.kernel.errors import Overloaded


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

    def spawn(self, work: Coroutine[Any, Any, None], name: str = "") -> asyncio.Task[None]:
        """Start the work, with a name if it is worth one; raises ``Overloaded`` at the limit."""
        if len(self._tasks) >= self._limit:
            work.close()
            raise Overloaded(f"{self._owner} runs {self._limit} tasks already: ask again later")
        task = self._loop.create_task(work)
        if name:
            task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(task.get_name(), error)

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
