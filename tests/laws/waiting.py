"""What the tests of law 6 share: how long something took, what holds it up, and what is left behind."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Self

from spine.kernel.exchange import ROUTER
from tests.laws.world import file_of

CHILDREN = ["coordinator", "registry", ROUTER, "audit"]


class Clocked:
    """How many seconds something took."""

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.took = time.monotonic() - self.began


def ours() -> list[str]:
    """The tasks of a Spine that still live."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith("spine.") or name in ("outbox", "StartRun", "CompleteRun")]


@contextmanager
def locked(url: str, seconds: float) -> Iterator[None]:
    """Another process's connection holds the write lock for so long."""
    with closing(sqlite3.connect(file_of(url), isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        unlock = threading.Timer(seconds, other.execute, ["ROLLBACK"])
        unlock.start()
        try:
            yield
        finally:
            unlock.join()
