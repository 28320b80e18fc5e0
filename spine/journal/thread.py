"""A thread that does blocking work for coroutines, one piece after the other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar, cast

from spine.kernel.errors import JournalError

T = TypeVar("T")


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[T]
    result: T | None = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:  # noqa: BLE001  whatever happened belongs to the waiting coroutine
            self.error = error

    def settle(self) -> None:
        if self.done.done():
            return
        if self.error is None:
            self.done.set_result(cast(T, self.result))
        else:
            self.done.set_exception(self.error)


def _tell(ended: Iterable[_Job[Any]]) -> None:
    """Wake each loop once for all the jobs of it that have ended."""
    loops: dict[asyncio.AbstractEventLoop, list[_Job[Any]]] = {}
    for job in ended:
        loops.setdefault(job.loop, []).append(job)
    for loop, jobs in loops.items():
        try:
            loop.call_soon_threadsafe(_settle, jobs)
        except RuntimeError:
            # The loop was closed: nobody waits any more, and the work is done all the same.
            continue


def _settle(jobs: Iterable[_Job[Any]]) -> None:
    for job in jobs:
        job.settle()


def _overdue(done: asyncio.Future[Any], name: str, seconds: float) -> None:
    if not done.done():
        done.set_exception(TimeoutError(f"the {name} gave no answer within {seconds:g} s"))


class Worker:
    """The thread and its queue.

    Cancelling a coroutine that waits for a piece of work does not stop the work. Up to ``together`` pieces that wait
    at the same time are told as done at the same time. ``idle`` runs when nothing came for ``idle_s`` seconds; it
    returns whether it wants to run again without new work before it.
    """

    def __init__(
        self, name: str, idle: Callable[[], bool] = lambda: False, idle_s: float = 1.0, *, together: int = 1
    ) -> None:
        self._name = name
        self._idle = idle
        self._idle_s = idle_s
        self._together = together
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._pid = 0
        self._closed = False

    def start(self) -> None:
        """Start the thread. Raises JournalError when it was started before."""
        if self._thread is not None:
            raise JournalError(f"this {self._name} was opened before: make a new one")
        self._pid = os.getpid()
        # A daemon: a program that forgets to stop its Spine still ends; what it was not told of is not promised.
        self._thread = Thread(target=self._run, name=f"spine-{self._name.replace(' ', '-')}", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], T], *, within_s: float | None = None) -> T:
        """Run ``work`` in the thread after all that was given before; its result or its error.

        Raises TimeoutError when there is neither ``within_s`` seconds from now; the work is done all the same.
        """
        done = self._give(work)
        if within_s is None:
            return await done
        timer = done.get_loop().call_later(within_s, _overdue, done, self._name, within_s)
        try:
            return await done
        finally:
            timer.cancel()

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
            raise JournalError(f"the {self._name} is not open: await its open() first")
        if self._pid != os.getpid():
            raise JournalError(
                f"the {self._name} was opened in process {self._pid} and this is its fork {os.getpid()}: "
                f"a fork must open a {self._name} of its own"
            )
        if self._closed:
            raise JournalError(f"the {self._name} is closed: make a new one")

    def _run(self) -> None:
        idle_due = False
        while True:
            try:
                job = self._jobs.get(timeout=self._idle_s if idle_due else None)
            except Empty:
                idle_due = self._idle()
                continue
            if not self._work(job):
                return
            idle_due = True

    def _work(self, job: _Job[Any] | None) -> bool:
        """Do ``job`` and what waits behind it, and tell; whether there may be more."""
        ended: list[_Job[Any]] = []
        while job is not None:
            job.run()
            ended.append(job)
            if len(ended) == self._together:
                break
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
        _tell(ended)
        return job is not None
