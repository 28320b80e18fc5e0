"""Whether the database file that is open still has its name."""

from __future__ import annotations

import os
from pathlib import Path

from spine.journal.faults import StorageError


class NamedFile:
    """Remembers which file is called ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = _identity(path.stat())

    def check(self) -> None:
        """Raise StorageError when the file was removed, or another one has its name now."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise StorageError(f"the database file is gone: {error}") from error
        if _identity(status) != self._identity:
            raise StorageError("the database file was replaced by another one while it was in use")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
