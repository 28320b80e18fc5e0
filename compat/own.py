"""A Spine that belongs to the shims: its own event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time

from compat.host import Host, HostType
from spine.kernel.errors import NotRunning


class OwnSpine:
    """Starts at once, on a daemon thread; ``ready`` waits for it, ``stop`` ends it."""

    def __init__(self, spine_type: HostType, url: str | None) -> None:
        self._type = spine_type
        self._url = url
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        # The Spine as soon as it exists, and once it has started.
        self.made: Host | None = None
        self.host: Host | None = None
        self._thread = threading.Thread(target=self._run, name="spine-compat", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether it could not start."""
        return self._error is not None

    def ready(self, timeout_s: float) -> Host:
        """The started Spine. Raises what its start raised, NotRunning when it takes longer than ``timeout_s``."""
        if not self._ready.is_set() and not self._ready.wait(timeout_s):
            raise NotRunning(
                f"the shims' own Spine did not start within {timeout_s:g} s (database {self._url or 'default'}): "
                "see whether another process holds the database"
            )
        if self._error is not None:
            raise self._error
        if self.host is None:
            raise NotRunning("the shims' own Spine was stopped while it started; call again")
        return self.host

    def stop(self, timeout_s: float) -> bool:
        """End it and wait for that, ``timeout_s`` seconds at most; whether it has ended."""
        if self._thread is threading.current_thread():
            return False
        end = time.monotonic() + timeout_s
        self._ready.wait(timeout_s)
        loop, ended = self._loop, self._end
        if loop is not None and ended is not None:
            try:
                loop.call_soon_threadsafe(ended.set)
            except RuntimeError:
                pass  # The loop is closed already.
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  the thread's last frame: its callers get the error
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        host = self.made = self._type(self._url)
        await host.start()
        self.host = host
        self._ready.set()
        try:
            await self._end.wait()
        finally:
            await host.stop()
