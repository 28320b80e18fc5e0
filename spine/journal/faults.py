"""Whose fault a driver's error is: the database's, which says nothing of the units, or one unit's."""

from __future__ import annotations

import sqlite3
from typing import Final

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from spine.governance.units import GuardFailed
from spine.kernel.errors import JournalError

# SQLite's primary result codes that speak of the database and not of the statement.
_SQLITE_STORAGE: Final = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_NOTADB,
    }
)
_SQLITE_UNIT: Final = frozenset(
    {sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE}
)
# PostgreSQL's classes: connection, read-only, rollback, resources, not in state, operator, system, internal.
_POSTGRESQL_STORAGE: Final = ("08", "25", "40", "53", "55", "57", "58", "XX")
# Its classes about values: data, constraint, too large; and a value of another type than the column's.
_POSTGRESQL_UNIT: Final = ("22", "23", "54", "42804")
_POSTGRESQL_DAMAGE: Final = ("XX001", "XX002")
_POSTGRESQL_PASSING: Final = ("40", "55P03")


class UnitFault(Exception):
    """A unit, not the database, is the reason why a transaction cannot be written."""

    def __init__(self, guard: str, required: int, found: int | None) -> None:
        super().__init__(guard)
        self.failed = GuardFailed(guard, required, found)


class StorageError(Exception):
    """The database, not a unit, is the reason why nothing was written, or why nobody knows (``unknown``)."""

    def __init__(self, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.unknown = unknown


class CommitUnknown(Exception):
    """COMMIT was sent and not confirmed: only the journal itself can tell what happened."""


def cause(error: BaseException) -> BaseException:
    """The driver's error behind ``error``."""
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def is_database(error: BaseException) -> bool:
    """Whether ``error`` came from the database or its files at all."""
    known = (StorageError, OSError, JournalError, sqlite3.Error, SQLAlchemyError)
    return isinstance(error, known) or hasattr(error, "sqlstate")


def is_storage(error: BaseException) -> bool:
    """Whether ``error`` speaks of the database rather than of the statement it was given."""
    error = cause(error)
    if isinstance(error, (StorageError, OSError, JournalError)):
        return True
    if isinstance(error, sqlite3.Error):
        return _sqlite_code(error) in _SQLITE_STORAGE
    state = getattr(error, "sqlstate", "")
    if state:
        return str(state).startswith(_POSTGRESQL_STORAGE)
    # psycopg has no state for a lost connection; its other errors without one are about parameters.
    return state is None and type(error).__name__ in {"OperationalError", "InterfaceError"}


def is_unit(error: BaseException) -> bool:
    """Whether an error of the journal's own statements is about the values it was given."""
    if isinstance(error, (ValueError, TypeError, OverflowError)):
        return True
    if isinstance(error, sqlite3.Error):
        # Without a code it is about the binding of a parameter.
        return _sqlite_code(error) in _SQLITE_UNIT or _sqlite_code(error) is None
    state = getattr(error, "sqlstate", "")
    if state:
        return str(state).startswith(_POSTGRESQL_UNIT)
    return state is None and not is_storage(error)


def is_damage(error: BaseException) -> bool:
    """Whether ``error`` says that what the database has stored is damaged."""
    if isinstance(error, sqlite3.Error):
        return _sqlite_code(error) == sqlite3.SQLITE_CORRUPT
    return isinstance(error, UnicodeDecodeError) or getattr(error, "sqlstate", None) in _POSTGRESQL_DAMAGE


def is_passing(error: BaseException) -> bool:
    """Whether a storage error leaves the connection as good as it was: somebody else held a lock."""
    if isinstance(error, sqlite3.Error):
        return _sqlite_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
    return str(getattr(error, "sqlstate", None) or "").startswith(_POSTGRESQL_PASSING)


def _sqlite_code(error: sqlite3.Error) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
