"""Blocking calls on daemon threads: one that never returns must not keep the process from ending, as anyio's would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from anyio._core._eventloop import threadlocals
from anyio.lowlevel import current_token

T = TypeVar("T")

# So many threads are kept for the next calls.
IDLE_MOST = 64

Job = tuple[Context, Callable[[], Any], "asyncio.Future[Any]"]
Jobs = SimpleQueue[Job | None]


class Threads:
    """Runs each call at once, on an idle thread or a new one: its user bounds how many there are.

    Bound to the event loop it was made on; ``anyio.from_thread`` leads back there from within a call.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._token = current_token()
        self._idle: list[Jobs] = []
        self._closed = False

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Begin the call in a copy of this context; it goes on to its end, whoever still waits for the future."""
        done: asyncio.Future[T] = self._loop.create_future()
        if self._idle:
            jobs = self._idle.pop()
        else:
            jobs = SimpleQueue()
            Thread(target=self._serve, args=(jobs,), name=self._name, daemon=True).start()
        jobs.put((copy_context(), work, done))
        return done

    def close(self) -> None:
        """Let the threads end, those that still work after their call."""
        self._closed = True
        while self._idle:
            self._idle.pop().put(None)

    def _serve(self, jobs: Jobs) -> None:
        # anyio knows its own worker threads by these two; there is no public way to be one.
        threadlocals.current_token, threadlocals.current_cancel_scope = self._token, None
        while (job := jobs.get()) is not None:
            context, work, done = job
            result: Any = None
            raised: BaseException | None = None
            try:
                result = context.run(work)
            except BaseException as error:  # noqa: BLE001  whatever happened belongs to who waits
                raised = error
            kept = len(self._idle) < IDLE_MOST
            if kept:
                self._idle.append(jobs)
            try:
                self._loop.call_soon_threadsafe(_settle, done, result, raised)
            except RuntimeError:
                # The loop was closed: nobody waits any more.
                return
            del job, context, work, done, result, raised
            # Looked at last: who closes looks at the idle ones last.
            if self._closed or not kept:
                return


def _settle(done: asyncio.Future[Any], result: Any, raised: BaseException | None) -> None:
    if done.done():
        return
    if raised is None:
        done.set_result(result)
    elif isinstance(raised, StopIteration):
        # No future takes it, for it would end the generator that waits.
        error = RuntimeError("a call raised StopIteration")
        error.__cause__ = raised
        done.set_exception(error)
    else:
        done.set_exception(raised)
