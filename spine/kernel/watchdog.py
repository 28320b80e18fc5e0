"""The blocked-loop witness: a thread that notices an event loop standing still and says which code holds it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FrameType

from spine.kernel.tracing import Tracer

BEAT_S = 0.25
REPORTS = 16


@dataclass(frozen=True, slots=True)
class Blocked:
    """One stand-still: for at least how many seconds, by what, and the stack of the loop's thread."""

    seconds: float
    culprit: str
    stack: str


class Watchdog:
    """Watches one loop; ``names`` tells which code object belongs to which handler or rule."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, tracer: Tracer, names: Mapping[CodeType, str], *, limit_s: float
    ) -> None:
        self._loop = loop
        self._tracer = tracer
        self._names = names
        self._limit_s = limit_s
        self._loop_thread = threading.get_ident()
        self._stopping = threading.Event()
        self._beat = threading.Event()
        self.reports: deque[Blocked] = deque(maxlen=REPORTS)
        self._thread = threading.Thread(target=self._watch, name="spine.watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns at once, the thread ends within a beat."""
        self._stopping.set()
        self._beat.set()

    def _watch(self) -> None:
        while not self._stopping.wait(BEAT_S):
            self._beat.clear()
            try:
                self._loop.call_soon_threadsafe(self._beat.set)
            except RuntimeError:
                return
            if self._beat.wait(self._limit_s):
                continue
            asked = time.monotonic()
            frame = sys._current_frames().get(self._loop_thread)
            culprit = self._culprit(frame)
            stack = "" if frame is None else "".join(traceback.format_stack(frame)[-12:])
            del frame
            self._tracer.fault("spine.loop.blocked", culprit=culprit, seconds=self._limit_s, stack=stack)
            self._beat.wait()
            if not self._stopping.is_set():
                self.reports.append(Blocked(round(time.monotonic() - asked + self._limit_s, 3), culprit, stack))

    def _culprit(self, frame: FrameType | None) -> str:
        while frame is not None:
            if (name := self._names.get(frame.f_code)) is not None:
                return name
            frame = frame.f_back
        return "unknown"
