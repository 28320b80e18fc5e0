"""What the bridge needs of a Spine: the whole of what it uses, so that a test can stand in for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from spine.kernel.messages import Request


class Pending(Protocol):
    """What posting a request gives."""

    def cancel(self) -> object: ...


class Host(Protocol):
    """What the bridge needs of a Spine; ``post`` is called on its loop's thread, and calls ``on_done`` there once."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None: ...

    @property
    def is_running(self) -> bool: ...

    def post(
        self,
        request: Request[Any],
        /,
        *,
        timeout_s: float,
        on_done: Callable[[object | None, BaseException | None], None],
    ) -> Pending: ...

    async def start(self) -> object: ...

    async def stop(self) -> object: ...


class HostType(Protocol):
    """The class of such a Spine."""

    def __call__(self, url: str | None = None, /) -> Host: ...

    def running(self) -> Host | None: ...
