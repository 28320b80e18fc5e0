"""One lock file beside an SQLite database: many may write through it, or one may copy the log back.

SQLite before 3.51.3 can lose pages when a checkpoint runs while another process begins the log anew; under this lock
it never does.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


class FileLock:
    """An advisory lock of the whole process, shared or exclusive; never waits longer than told."""

    def __init__(self, path: Path) -> None:
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def share(self, timeout_s: float) -> bool:
        """Take it together with others; whether that worked within ``timeout_s`` seconds."""
        give_up: float | None = None
        while not self._try(fcntl.LOCK_SH):
            now = time.monotonic()
            give_up = now + timeout_s if give_up is None else give_up
            if now >= give_up:
                return False
            time.sleep(0.002)
        return True

    def own(self) -> bool:
        """Take it alone, at once or not at all."""
        return self._try(fcntl.LOCK_EX)

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give it back for good."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _try(self, kind: int) -> bool:
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
