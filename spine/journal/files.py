"""Whether the database file that is open still has its name."""

from __future__ import annotations

from pathlib import Path

from spine.journal.faults import StorageError


class NamedFile:
    """Remembers which file was called ``path`` when it was first looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None

    def forget(self) -> None:
        """Take the file that is found next."""
        self._identity = None

    def check(self) -> None:
        """Raise StorageError when there is no such file, or another one has its name now."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise StorageError(f"the database file is gone: {error}") from error
        found = status.st_dev, status.st_ino
        self._identity = self._identity or found
        if found != self._identity:
            raise StorageError("the database file was replaced by another one while it was in use")
