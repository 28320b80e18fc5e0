"""SQL as named constants that take any number of rows at once, on SQLite and PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

Params = tuple[Any, ...]
Placeholder = Literal["?", "%s"]


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """One statement of a projection: ``head``, then ``item`` once for each row, then ``tail``.

    Within a group of rows, statements run by ascending ``rank``: inserts, then updates, then deletes. Each row must
    change exactly one row of ``table``, else the guard called ``guard`` has failed. ``key`` reads from the parameters
    which row of the table they touch. ``many`` tells whether ``item`` may be repeated; an update cannot.
    ``undoes`` is the insert that this delete takes back.
    """

    table: str
    rank: int
    guard: str
    head: str
    item: str
    tail: str
    key: Callable[[Params], Any]
    many: bool = True
    undoes: Statement | None = None

    def sql(self, rows: int, placeholder: Placeholder) -> str:
        """The text for ``rows`` rows (one, unless ``many``)."""
        text = self.head + ",".join([self.item] * rows) + self.tail
        return text if placeholder == "?" else text.replace("?", placeholder)

    def room(self, rows: int) -> str:
        """SQLite's text with room for ``rows`` rows: fill it up with nulls; an insert also takes the true number."""
        items = ",".join([self.item] * rows)
        if self.undoes is not None:
            return self.head + items + self.tail
        return self.head.replace("VALUES ", f"SELECT * FROM (VALUES {items}) LIMIT ?") + self.tail


Operation = tuple[Statement, Params]
Fields = Mapping[str, Any]


def words(values: Iterable[str]) -> str:
    """Constant words as a list in SQL."""
    return ", ".join(sorted(f"'{value}'" for value in values))


def insert(
    table: str, rank: int, guard: str, columns: str, *, key: Sequence[int] = (0,), conflict: str = "DO NOTHING"
) -> Statement:
    """An insert of ``columns`` (separated by blanks) that changes nothing where the row is there already."""
    names = columns.split()
    return Statement(
        table=table,
        rank=rank,
        guard=guard,
        head=f"INSERT INTO {table} ({', '.join(names)}) VALUES ",
        item=f"({', '.join('?' * len(names))})",
        tail=f" ON CONFLICT {conflict}",
        key=itemgetter(*key),
    )


def update(table: str, rank: int, guard: str, sets: str, where: str, *, key: Sequence[int]) -> Statement:
    """An update of one row at a time."""
    text = f"UPDATE {table} SET {sets} WHERE {where}"
    return Statement(table=table, rank=rank, guard=guard, head=text, item="", tail="", key=itemgetter(*key), many=False)


def delete(table: str, rank: int, guard: str, column: str, *, undoes: Statement) -> Statement:
    """A delete, by a key of one column, of what ``undoes`` inserted."""
    return Statement(
        table=table,
        rank=rank,
        guard=guard,
        head=f"DELETE FROM {table} WHERE {column} IN (",
        item="?",
        tail=")",
        key=itemgetter(0),
        undoes=undoes,
    )
