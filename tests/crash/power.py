"""Power loss under SQLite: a VFS that logs what is done to the files, and what a disk may hold of that after a cut.

The files themselves are real and whole: the log alone knows what was synced. So one run serves for every moment at
which the power may go: a ``Disk`` takes the log up to that moment and tells what survives. Of what was not synced,
each 512-byte sector survives or not by itself, whatever came before or after it, or is left as garbage; so does each
truncation. Names are kept by a journalling file system: a creation or removal survives only if all before it did.
A directory is synced where SQLite's unix VFS does it: with a removal that asks for it, and with the first sync of a
rollback journal or a log. As SQLite assumes by default, a write damages no byte beside it (powersafe overwrite).
What writes is apsw's own SQLite; what is left may be opened by the interpreter's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

apsw = pytest.importorskip("apsw", reason="apsw is not installed: no test loses power under SQLite")

SECTOR = 512
_DML = ("INSERT", "UPDATE", "DELETE", "REPLACE")


@dataclass(frozen=True, slots=True)
class Created:
    """A new empty file got its name."""

    name: str
    file: int


@dataclass(frozen=True, slots=True)
class Removed:
    name: str


@dataclass(frozen=True, slots=True)
class DirectorySynced:
    pass


@dataclass(frozen=True, slots=True)
class Wrote:
    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncated:
    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Synced:
    file: int


@dataclass(frozen=True, slots=True)
class Told:
    """A caller was told something, and from here on relies on it."""

    what: Any


Step = Created | Removed | DirectorySynced | Wrote | Truncated | Synced | Told


@dataclass(frozen=True, slots=True)
class Fate:
    """How likely a sector or a change of names that was not synced survives, and a lost sector is garbage."""

    kept: float
    garbage: float = 0.0


NOTHING, EVERYTHING = Fate(0), Fate(1)
SOMETHING = (Fate(0.9, 0.1), Fate(0.5, 0.1), Fate(0.1), Fate(0.5))


@dataclass(slots=True)
class _File:
    durable: bytearray = field(default_factory=bytearray)
    waiting: list[Wrote | Truncated] = field(default_factory=list)


class Disk:
    """What is on a disk for certain, and what is on its way there. Files it ``holds`` at first are durable."""

    def __init__(self, holds: Mapping[str, bytes] | None = None) -> None:
        held = dict(holds or {})
        # Numbers as a Recorder gives them to files that are there before it.
        self._names = {name: -number for number, name in enumerate(sorted(held), start=1)}
        self._renames: list[Created | Removed] = []
        self._files = {number: _File(bytearray(held[name])) for name, number in self._names.items()}

    def take(self, step: Step) -> None:
        """Go on by one step."""
        match step:
            case Created(_, number):
                self._files[number] = _File()
                self._renames.append(step)
            case Removed():
                self._renames.append(step)
            case DirectorySynced():
                self._names = _renamed(self._names, self._renames)
                self._renames.clear()
            case Wrote(number) | Truncated(number):
                self._files[number].waiting.append(step)
            case Synced(number):
                file = self._files[number]
                for change in file.waiting:
                    _apply(file.durable, change)
                file.waiting.clear()
            case Told():
                pass

    def after_power_loss(self, fate: Fate, chance: Random) -> dict[str, bytes]:
        """The files as they are found when the power is back."""
        survived = next((n for n in range(len(self._renames)) if chance.random() >= fate.kept), len(self._renames))
        names = _renamed(self._names, self._renames[:survived])
        return {name: _survivor(self._files[number], fate, chance) for name, number in sorted(names.items())}


def _renamed(names: Mapping[str, int], renames: Sequence[Created | Removed]) -> dict[str, int]:
    now = dict(names)
    for step in renames:
        if isinstance(step, Created):
            now[step.name] = step.file
        else:
            del now[step.name]
    return now


def _apply(content: bytearray, change: Wrote | Truncated) -> None:
    end = change.size if isinstance(change, Truncated) else change.offset
    if end > len(content):
        content.extend(bytes(end - len(content)))
    if isinstance(change, Truncated):
        del content[change.size :]
    else:
        content[change.offset : change.offset + len(change.data)] = change.data


def _survivor(file: _File, fate: Fate, chance: Random) -> bytes:
    content = bytearray(file.durable)
    for change in file.waiting:
        for part in _sectors(change):
            if chance.random() < fate.kept:
                _apply(content, part)
            elif isinstance(part, Wrote) and chance.random() < fate.garbage:
                _apply(content, Wrote(part.file, part.offset, chance.randbytes(len(part.data))))
    return bytes(content)


def _sectors(change: Wrote | Truncated) -> Iterator[Wrote | Truncated]:
    if isinstance(change, Truncated):
        yield change
        return
    at, end = change.offset, change.offset + len(change.data)
    while at < end:
        upto = min(end, (at // SECTOR + 1) * SECTOR)
        yield Wrote(change.file, at, change.data[at - change.offset : upto - change.offset])
        at = upto


class Recorder(apsw.VFS):
    """The VFS: SQLite's own for this system, and each change of a named file in ``log``. Syncing is only logged."""

    _numbers = count()

    def __init__(self, log: list[Step], holds: Sequence[str] = ()) -> None:
        self.name = f"spine-power-{next(self._numbers)}"
        super().__init__(self.name, "")
        self.log = log
        self._files = count()
        self._named = {name: -number for number, name in enumerate(sorted(holds), start=1)}

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802  apsw's name
        if name is None:
            return apsw.VFSFile("", name, flags)
        path = Path(name.filename() if isinstance(name, apsw.URIFilename) else name)
        is_new = not path.exists()
        file = _RecordedFile(name, flags)
        if is_new:
            self._named[path.name] = next(self._files)
            self.log.append(Created(path.name, self._named[path.name]))
        file.log, file.number = self.log, self._named[path.name]
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        super().xDelete(filename, syncdir)
        name = Path(filename).name
        del self._named[name]
        self.log.append(Removed(name))
        if syncdir:
            self.log.append(DirectorySynced())


class _RecordedFile(apsw.VFSFile):
    log: list[Step]
    number: int

    def __init__(self, name: Any, flags: list[int]) -> None:
        journal = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL
        self._sync_directory = bool(flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & journal)
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        self.log.append(Wrote(self.number, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        super().xTruncate(newsize)
        self.log.append(Truncated(self.number, newsize))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.log.append(Synced(self.number))
        if self._sync_directory:
            self.log.append(DirectorySynced())
            self._sync_directory = False


@contextmanager
def recorded(*, synchronous: str = "FULL", holds: Sequence[str] = ()) -> Iterator[list[Step]]:
    """The log of every connection that is opened meanwhile, the journal's readers included.

    ``holds`` names the files that are there already. What asks for ``synchronous=FULL`` gets what is said here.
    """
    log: list[Step] = []
    vfs = Recorder(log, holds)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Two libraries of SQLite in one process would not see each other's locks: all of it goes through one.
            patch.setattr(sqlite3, "connect", partial(Connection, vfs.name, synchronous))
            yield log
    finally:
        vfs.unregister()


class Connection:
    """As much of ``sqlite3.Connection`` in autocommit as the journal and SQLAlchemy ask for, over apsw."""

    isolation_level = None

    def __init__(
        self, vfs: str, synchronous: str, database: str | Path, *, timeout: float = 5.0, **_settings: Any
    ) -> None:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_URI
        self._synchronous = synchronous
        with _as_sqlite3():
            self.apsw = apsw.Connection(str(database), flags=flags, vfs=vfs)
            self.apsw.set_busy_timeout(round(timeout * 1000))

    @property
    def in_transaction(self) -> bool:
        return bool(self.apsw.in_transaction)

    def set_progress_handler(self, handler: Any, steps: int) -> None:
        self.apsw.set_progress_handler(handler, steps)

    def interrupt(self) -> None:
        self.apsw.interrupt()

    def cursor(self) -> Cursor:
        return Cursor(self.apsw)

    def execute(self, sql: str, params: Any = ()) -> Cursor:
        if sql == "PRAGMA synchronous=FULL":
            sql = f"PRAGMA synchronous={self._synchronous}"
        return self.cursor().execute(sql, params)

    def commit(self) -> None:
        if self.in_transaction:
            self.execute("COMMIT")

    def rollback(self) -> None:
        if self.in_transaction:
            self.execute("ROLLBACK")

    def create_function(self, *_function: Any, **_settings: Any) -> None:
        """SQLAlchemy brings functions of its own; the journal calls none of them."""

    def close(self) -> None:
        with _as_sqlite3():
            self.apsw.close()


class Cursor:
    """As much of ``sqlite3.Cursor``; a statement's rows are all fetched at once."""

    lastrowid = None

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.rowcount = -1
        self.description: Any = None

    def execute(self, sql: str, params: Any = ()) -> Cursor:
        cursor = self._connection.cursor()
        # The columns of a result without rows are known only before the first step.
        cursor.exec_trace = self._describe
        with _as_sqlite3():
            self._rows = list(cursor.execute(sql, params or None))
        self.rowcount = self._connection.changes() if sql.lstrip().upper().startswith(_DML) else -1
        return self

    def _describe(self, cursor: apsw.Cursor, _sql: str, _params: Any) -> bool:
        self.description = cursor.description or None
        return True

    def executemany(self, sql: str, rows: Sequence[Any]) -> Cursor:
        self.rowcount = sum(self.execute(sql, row).rowcount for row in rows)
        return self

    def fetchone(self) -> Any:
        return self._rows.pop(0) if self._rows else None

    def fetchmany(self, size: int = 1) -> list[Any]:
        rows, self._rows = self._rows[:size], self._rows[size:]
        return rows

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    def close(self) -> None:
        self._rows = []


@contextmanager
def _as_sqlite3() -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        kind = sqlite3.IntegrityError if isinstance(error, apsw.ConstraintError) else sqlite3.OperationalError
        raised = kind(str(error))
        raised.sqlite_errorcode = error.extendedresult  # type: ignore[misc]
        raise raised from error
