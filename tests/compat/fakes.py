"""A Spine's outside as the bridge sees it, without anything behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

from spine.kernel.errors import NotRunning
from spine.kernel.messages import Request


@dataclass(slots=True)
class Echo(Request[object]):
    """Answered with ``value``: raised when it is an exception, never when it is ``Silence``."""

    value: object
    run_id: str = "run-1"
    delay_s: float = 0.0


class Silence:
    """No answer at all."""


class FakeHandle:
    def __init__(self, finish: Callable[[object, BaseException | None], None]) -> None:
        self.finish = finish
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeSpine:
    """Answers on the loop that started it; keeps everything it was sent."""

    _all: list[FakeSpine] = []
    fail_start: BaseException | None = None
    started = 0

    def __init__(self, url: str | None = None) -> None:
        self.url = url
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_running = False
        self.posted: list[object] = []
        self.handles: list[FakeHandle] = []
        self.stopped = False

    @classmethod
    def running(cls) -> FakeSpine | None:
        alive = [spine for spine in FakeSpine._all if spine.is_running]
        return alive[-1] if alive else None

    async def start(self) -> None:
        type(self).started += 1
        await asyncio.sleep(0.01)
        if type(self).fail_start is not None:
            raise type(self).fail_start
        self.loop = asyncio.get_running_loop()
        self.is_running = True
        FakeSpine._all.append(self)

    async def stop(self) -> None:
        self.is_running = False
        self.stopped = True
        if self in FakeSpine._all:
            FakeSpine._all.remove(self)

    def post(
        self, request: Echo, /, *, timeout_s: float, on_done: Callable[[object, BaseException | None], None]
    ) -> FakeHandle:
        loop = asyncio.get_running_loop()
        assert loop is self.loop
        if not self.is_running:
            raise NotRunning("stopped")
        handle = FakeHandle(on_done)
        self.posted.append(request.value)
        self.handles.append(handle)
        if isinstance(request.value, BaseException):
            loop.call_later(request.delay_s, on_done, None, request.value)
        elif not isinstance(request.value, Silence):
            loop.call_later(request.delay_s, on_done, request.value, None)
        return handle


@contextmanager
def running_elsewhere(spine: FakeSpine):
    """``spine`` runs on the event loop of another thread; yields that loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(spine.start(), loop).result(5)
    try:
        yield loop
    finally:
        if not loop.is_closed():
            asyncio.run_coroutine_threadsafe(spine.stop(), loop).result(5)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(5)
            loop.close()
