"""A thread that does blocking work for coroutines, one piece after the other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from spine.kernel.errors import JournalError

T = TypeVar("T")


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[T]

    def run(self) -> None:
        try:
            result = self.work()
        except BaseException as error:  # noqa: BLE001  whatever happened belongs to the waiting coroutine
            self._report(_fail, error)
        else:
            self._report(_succeed, result)

    def _report(self, settle: Callable[[asyncio.Future[Any], Any], None], value: object) -> None:
        try:
            self.loop.call_soon_threadsafe(settle, self.done, value)
        except RuntimeError:
            # The loop was closed: nobody waits any more, and the work is done all the same.
            return


def _succeed(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[Any], error: BaseException) -> None:
    if not done.done():
        done.set_exception(error)


class Worker:
    """The thread and its queue.

    Cancelling a coroutine that waits for a piece of work does not stop the work. ``idle`` runs when nothing came for
    ``idle_s`` seconds; it returns whether it wants to run again without new work before it.
    """

    def __init__(self, name: str, idle: Callable[[], bool], idle_s: float) -> None:
        self._name = name
        self._idle = idle
        self._idle_s = idle_s
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._pid = 0
        self._closed = False

    def start(self) -> None:
        """Start the thread. Raises JournalError when it was started before."""
        if self._thread is not None:
            raise JournalError("this journal writer was opened before: make a new one")
        self._pid = os.getpid()
        # A daemon: a program that forgets to stop its Spine still ends; what it was not told of is not promised.
        self._thread = Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the thread after all that was given before; its result or its error."""
        return await self._give(work)

    async def stop(self, last: Callable[[], None]) -> None:
        """Finish what was given, run ``last``, end the thread. Again, or in a forked child, it does nothing."""
        if self._thread is None or self._closed or self._pid != os.getpid():
            return
        ended = self._give(last)
        self._closed = True
        self._jobs.put(None)
        await asyncio.shield(ended)

    def _give(self, work: Callable[[], T]) -> asyncio.Future[T]:
        self._check()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(work, loop, done))
        return done

    def _check(self) -> None:
        if self._thread is None:
            raise JournalError("the journal writer is not open: await its open() first")
        if self._pid != os.getpid():
            raise JournalError(
                f"the journal writer was opened in process {self._pid} and this is its fork {os.getpid()}: "
                "a fork must open a journal writer of its own"
            )
        if self._closed:
            raise JournalError("the journal writer is closed: make a new one")

    def _run(self) -> None:
        idle_due = False
        while True:
            try:
                job = self._jobs.get(timeout=self._idle_s if idle_due else None)
            except Empty:
                idle_due = self._idle()
                continue
            if job is None:
                return
            job.run()
            idle_due = True
