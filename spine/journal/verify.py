"""Verification: recompute chain, copied columns, head and projections, and name every place that does not fit."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from sqlalchemy import Engine

from spine.journal.chain import STREAM
from spine.journal.chain_check import ROW_COLUMNS, Break, ChainCheck
from spine.journal.engine import (
    Target,
    check_version,
    lenient,
    parse_url,
    read_only_uri,
    reading_engine,
    stored_version,
    unavailable,
)
from spine.journal.faults import is_damage
from spine.journal.rebuild import Rebuild, ordered
from spine.kernel.errors import JournalError

__all__ = ["Break", "VerifyReport", "verify"]

_PAGE: Final = 1_000
_JOURNAL: Final = f"SELECT {', '.join(ROW_COLUMNS)} FROM journal WHERE stream = '{STREAM}' ORDER BY seq"
_STRANGERS: Final = f"SELECT stream, seq FROM journal WHERE stream < '{STREAM}' OR stream > '{STREAM}'"
_HEADS: Final = "SELECT stream, size, hash FROM journal_head ORDER BY stream"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found: whether all fits, how many rows there are, every break, and the chain's end as found."""

    ok: bool
    rows: int
    breaks: list[Break]
    head: tuple[int, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as ``spine verify --json`` shows it."""
        breaks = [{"stream": found.stream, "seq": found.seq, "kind": found.kind} for found in self.breaks]
        return {"ok": self.ok, "rows": self.rows, "breaks": breaks}


def verify(url: str, checkpoints: Sequence[tuple[int, str]] = ()) -> VerifyReport:
    """Verify the journal at ``url`` as it is at this moment; writers may go on.

    ``checkpoints`` are (number of rows, hash of the last of them in hex) as kept outside the database: a chain that was
    rewritten whole differs from them. Raises JournalError when it cannot be verified: there is none, its schema is
    another version's, or the database cannot be read.
    """
    target = parse_url(url)
    kept: dict[int, set[str]] = {}
    for size, digest in checkpoints:
        kept.setdefault(size, set()).add(digest.lower())
    try:
        return _verify(target, kept)
    except JournalError:
        raise
    except Exception as error:
        raise unavailable(target, error) from error


def _verify(target: Target, kept: dict[int, set[str]]) -> VerifyReport:
    engine, check = reading_engine(target), ChainCheck(kept)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        source = stack.enter_context(_snapshot(engine, target))
        rebuild = stack.enter_context(closing(Rebuild()))
        indexes = stack.enter_context(_index_check(target))
        try:
            check_version(stored_version(source.connection, target), target)
            for page in source.read(_JOURNAL):
                rebuild.take(check.take(page))
            for page in source.read(_STRANGERS):
                check.breaks += [Break(str(stream), _number(seq), "head", "another stream") for stream, seq in page]
            check.finish([head for page in source.read(_HEADS) for head in page])
            rebuild.compare(lambda table: chain.from_iterable(source.read(ordered(table))))
        except Exception as error:
            if not is_damage(error):
                raise
            check.unreadable(error)
        breaks = sorted({*check.breaks, *rebuild.breaks, *indexes()})
    return VerifyReport(not breaks, check.rows, breaks, (check.last, check.stored.hex()))


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


@dataclass(slots=True)
class _Source:
    """One transaction that sees the database at one moment, and reads it page by page."""

    target: Target
    connection: Any

    def read(self, sql: str) -> Iterator[list[Any]]:
        """The rows of a query, a page at a time; text that is no longer UTF-8 is given as it is stored."""
        given = 0
        try:
            for page in self._pages(sql, _PAGE):
                yield page
                given += len(page)
        except sqlite3.DatabaseError:
            # Undecodable bytes are for the hash to tell. One row at a time, to come up to what cannot be read at all.
            self.connection.text_factory = lenient
            yield from self._pages(f"{sql} LIMIT -1 OFFSET {given}", 1)

    def _pages(self, sql: str, size: int) -> Iterator[list[Any]]:
        sqlite = self.target.dialect == "sqlite"
        # A server-side cursor: the client-side one would fetch everything at once.
        cursor = self.connection.cursor() if sqlite else self.connection.cursor(name="spine_verify")
        try:
            cursor.execute(sql)
            while page := cursor.fetchmany(size):
                yield page
        finally:
            cursor.close()


@contextmanager
def _snapshot(engine: Engine, target: Target) -> Iterator[_Source]:
    proxy = engine.raw_connection()
    connection: Any = proxy.driver_connection
    try:
        if target.dialect == "sqlite":
            connection.execute("BEGIN")
        else:
            from psycopg import IsolationLevel

            connection.isolation_level = IsolationLevel.REPEATABLE_READ
        yield _Source(target, connection)
    finally:
        connection.rollback()
        proxy.close()


@contextmanager
def _index_check(target: Target) -> Iterator[Callable[[], list[Break]]]:
    """SQLite's own check that every index finds what its table holds, on another thread; nothing on PostgreSQL."""
    if target.dialect != "sqlite":
        yield list
        return
    uri = read_only_uri(target)

    def check() -> list[Break]:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            try:
                said = [line for (line,) in connection.execute("PRAGMA integrity_check")]
            except Exception as error:
                if not is_damage(error):
                    raise
                said = [str(error)]
        return [] if said == ["ok"] else [Break(STREAM, 0, "index", "; ".join(map(str, said)))]

    with ThreadPoolExecutor(1, "spine-verify") as threads:
        yield threads.submit(check).result
