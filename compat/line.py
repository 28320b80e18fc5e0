"""The queue from threads into an event loop, which wakes the loop once for all that wait in it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from compat.host import Host, Pending
from compat.own import OwnSpine
from spine.kernel.errors import NotRunning
from spine.kernel.messages import Request


class Call:
    """One blocking call: what is asked, and where its answer comes back."""

    __slots__ = ("abandoned", "done", "error", "pending", "request", "result", "timeout_s", "waiter")

    def __init__(self, request: Request[Any], timeout_s: float, waiter: threading.Lock) -> None:
        self.request = request
        self.timeout_s = timeout_s
        self.waiter = waiter
        self.pending: Pending | None = None
        self.result: object | None = None
        self.error: BaseException | None = None
        self.done = False
        self.abandoned = False

    def finish(self, result: object | None, error: BaseException | None) -> None:
        """Hand the answer over and wake the thread that waits for it."""
        if not self.done:
            self.result = result
            self.error = error
            self.done = True
            self.waiter.release()

    def cancel(self) -> None:
        """Cancel what has not started; runs on the loop's thread."""
        if self.pending is not None and not self.done:
            self.pending.cancel()


class Line:
    """The queue into one Spine's loop; ``settled`` while no other Spine takes its place unless this one ends."""

    __slots__ = ("_calls", "_woken", "host", "loop", "own", "running", "settled")

    def __init__(
        self,
        host: Host,
        loop: asyncio.AbstractEventLoop,
        own: OwnSpine | None,
        running: Callable[[], Host | None],
        *,
        settled: bool,
    ) -> None:
        self.host = host
        self.loop = loop
        self.own = own
        self.running = running
        self.settled = settled
        self._calls: deque[Call] = deque()
        self._woken = False

    def put(self, call: Call) -> None:
        """Queue ``call``; the loop is woken only by the first that finds it asleep."""
        self._calls.append(call)
        if self._woken:
            return
        try:
            self._woken = True
            self.loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # Others that wait in this queue find the loop closed when they look.
            raise closed() from None
        except BaseException:
            # Ctrl-C in between: the next call must wake the loop, or nobody ever would.
            self._woken = False
            raise

    def _drain(self) -> None:
        # Cleared before the queue is read: whoever appends after the last read wakes the loop again.
        self._woken = False
        calls = self._calls
        post = self.host.post
        while calls:
            call = calls.popleft()
            if call.abandoned:
                continue
            try:
                call.pending = post(call.request, timeout_s=call.timeout_s, on_done=call.finish)
            except Exception as error:  # noqa: BLE001  whatever a refused post raises belongs to its caller
                call.finish(None, error)

    def abandon(self, call: Call) -> None:
        """Nobody waits for ``call`` any more: cancel it where it has not started."""
        call.abandoned = True
        try:
            self.loop.call_soon_threadsafe(call.cancel)
        except RuntimeError:
            call.done = True


def closed() -> NotRunning:
    """What a call gets whose loop does not exist any more."""
    return NotRunning(
        "the event loop of the Spine this call was meant for is closed: keep the Spine running while workers use it, "
        "or call compat.connect(...) with another target"
    )
