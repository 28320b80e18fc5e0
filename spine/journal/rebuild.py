"""The projections built again from the journal's bodies, and compared table by table with the stored ones."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Final

from sqlalchemy import Table, create_engine
from sqlalchemy.pool import StaticPool

from spine.journal.batch import Waves
from spine.journal.chain import STREAM
from spine.journal.chain_check import Break
from spine.journal.faults import is_damage
from spine.journal.projections import projections
from spine.journal.statements import Operation, Statement
from spine.journal.tables import FIRST_GOVERNANCE, PROJECTIONS, governance, metadata

_PENDING_AT_MOST: Final = 10_000

Stored = Callable[[Table], Iterable[Sequence[Any]]]

# How a row without a journal row's number of its own finds the one it belongs to.
_PLACES: Final = {
    "run_expectations": "SELECT started_seq FROM runs WHERE run_id = CAST(? AS TEXT)",
    "steps": "SELECT seq_begun FROM transactions WHERE tx_id = CAST(? AS TEXT)",
}
_PLACE_COLUMNS: Final = ("seq", "started_seq", "seq_decision", "seq_begun")


class Rebuild:
    """A temporary database that the records are projected into once more."""

    def __init__(self) -> None:
        # SQLite's own temporary database: in memory while small, in an unnamed file when not.
        self._connection = sqlite3.connect("", isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=MEMORY")
        self._connection.execute("PRAGMA synchronous=OFF")
        engine = create_engine("sqlite+pysqlite://", creator=lambda: self._connection, poolclass=StaticPool)
        metadata.create_all(engine, tables=list(PROJECTIONS))
        with engine.begin() as connection:
            connection.execute(governance.insert(), FIRST_GOVERNANCE)
        self._texts: dict[Statement, str] = {}
        self._pending: list[tuple[int, Operation]] = []
        self._waves = Waves()
        self.breaks: list[Break] = []

    def close(self) -> None:
        """Remove the temporary database."""
        self._connection.close()

    def take(self, records: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Project the next records (row number and body)."""
        for seq, fields in records:
            try:
                operations = projections(fields, seq)
                for statement, params in operations:
                    self._waves.add(statement, params)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                self.breaks.append(Break(STREAM, seq, "body", f"a field is missing or of another kind: {error!r}"))
                continue
            self._pending.extend([(seq, operation) for operation in operations])
        if len(self._pending) >= _PENDING_AT_MOST:
            self.flush()

    def flush(self) -> None:
        """Bring the temporary database up to the last record taken."""
        pending, waves = self._pending, self._waves
        self._pending, self._waves = [], Waves()
        self._connection.execute("BEGIN")
        try:
            applied = all(self._apply(statement, rows) for statement, rows in waves)
        except (sqlite3.Error, ValueError, OverflowError):
            applied = False
        self._connection.execute("COMMIT" if applied else "ROLLBACK")
        if not applied:
            self._one_by_one(pending)

    def _apply(self, statement: Statement, rows: Sequence[tuple[Any, ...]]) -> bool:
        text = self._texts.get(statement)
        if text is None:
            text = self._texts[statement] = statement.sql(1, "?")
        return self._connection.executemany(text, rows).rowcount == len(rows)

    def _one_by_one(self, pending: Sequence[tuple[int, Operation]]) -> None:
        """Find the records that do not follow from those before them."""
        for seq, (statement, params) in pending:
            try:
                applied = self._apply(statement, [params])
            except (sqlite3.Error, ValueError, OverflowError):
                applied = False
            if not applied:
                kind = f"projection:{statement.table}"
                self.breaks.append(Break(STREAM, seq, kind, f"{statement.guard}: contradicts the rows before it"))

    def compare(self, stored: Stored) -> None:
        """Compare every projection with the ``stored`` rows of its table, both in the order of the primary key."""
        self.flush()
        for table in PROJECTIONS:
            columns = [column.name for column in table.columns]
            keys = [columns.index(column.name) for column in table.primary_key.columns]
            ours, kind = self._connection.execute(ordered(table)), f"projection:{table.name}"
            try:
                for rebuilt, found in _merge(ours, stored(table), keys):
                    if rebuilt is None or found is None or tuple(rebuilt) != tuple(found):
                        seq = self._place(table, columns, rebuilt, found)
                        self.breaks.append(Break(STREAM, seq, kind, _said(columns, rebuilt, found)))
            except Exception as error:
                if is_damage(error):
                    self.breaks.append(Break(STREAM, 0, kind, f"the table cannot be read: {error}"))
                raise

    def _place(
        self, table: Table, columns: Sequence[str], rebuilt: Sequence[Any] | None, found: Sequence[Any] | None
    ) -> int:
        row = rebuilt if rebuilt is not None else found
        if row is None:
            return 0
        named = dict(zip(columns, row, strict=True))
        place = next((named[name] for name in _PLACE_COLUMNS if name in named), None)
        if table.name in _PLACES:
            owner = self._connection.execute(_PLACES[table.name], (_stored(row[0]),)).fetchone()
            place = owner[0] if owner is not None else None
        return place if type(place) is int else 0


def ordered(table: Table) -> str:
    """The query of a whole table by primary key, as both databases understand it."""
    columns = ", ".join(column.name for column in table.columns)
    keys = ", ".join(column.name for column in table.primary_key.columns)
    return f"SELECT {columns} FROM {table.name} ORDER BY {keys}"


def _merge(
    left: Iterable[Sequence[Any]], right: Iterable[Sequence[Any]], keys: Sequence[int]
) -> Iterator[tuple[Sequence[Any] | None, Sequence[Any] | None]]:
    """Pairs of rows with equal keys; a row without a partner is paired with ``None``."""
    end = (None,)
    lefts, rights = chain(left, end), chain(right, end)
    a, b = next(lefts), next(rights)
    while a is not None or b is not None:
        ours = None if a is None else [_comparable(a[key]) for key in keys]
        theirs = None if b is None else [_comparable(b[key]) for key in keys]
        if theirs is None or (ours is not None and ours < theirs):
            yield a, None
            a = next(lefts)
        elif ours is None or theirs < ours:
            yield None, b
            b = next(rights)
        else:
            yield a, b
            a, b = next(lefts), next(rights)


def _comparable(value: Any) -> tuple[int, Any]:
    """A key that sorts as SQLite does, whatever type somebody has put there."""
    if isinstance(value, (int, float)):
        return 1, value
    if isinstance(value, str):
        return 2, _stored(value)
    return (0, 0) if value is None else (3, bytes(value))


def _stored(value: Any) -> bytes:
    """Text, damaged or not, as the bytes that the database holds and sorts by."""
    return str(value).encode("utf-8", "surrogateescape")


def _said(columns: Sequence[str], rebuilt: Sequence[Any] | None, found: Sequence[Any] | None) -> str:
    if rebuilt is None or found is None:
        row = rebuilt if found is None else found
        what = "is missing from the table" if found is None else "does not follow from the journal"
        return f"row {row[0] if row else ''!r} {what}"
    wrong = [
        f"{name} is {theirs!r}, the journal says {ours!r}"
        for name, ours, theirs in zip(columns, rebuilt, found, strict=True)
        if ours != theirs
    ]
    return f"row {rebuilt[0]!r}: {'; '.join(wrong)}"
