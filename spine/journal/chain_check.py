"""The chain check: journal rows in, every place where the chain, a copied column or the head is broken out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from spine.journal.chain import GENESIS, MAIN_PREFIX, STREAM, row_hash

COLUMNS: Final = ("kind", "unit", "run_id", "tenant_id", "ref")
ROW_COLUMNS: Final = ("seq", "prev", "hash", "body", *COLUMNS)
_MOVED_AT_MOST: Final = 64


@dataclass(frozen=True, slots=True, order=True)
class Break:
    """One place where the record contradicts itself.

    ``kind`` is hash, prev, gap (missing rows from ``seq``), order (a row moved), column:NAME, body (not canonical
    JSON), head, tail (the last rows are missing), projection:TABLE, checkpoint, index (SQLite's own check), or
    unreadable (the database finds itself damaged behind row ``seq``, and nothing from there on was compared).
    """

    stream: str
    seq: int
    kind: str
    detail: str = field(default="", compare=False)


@dataclass(slots=True)
class ChainCheck:
    """Follows the rows of the main stream in order, remembering only where the chain stands."""

    checkpoints: Mapping[int, set[str]]
    breaks: list[Break] = field(default_factory=list)
    rows: int = 0
    last: int = 0
    stored: bytes = GENESIS
    computed: bytes = GENESIS
    met: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._meet(0, GENESIS)

    def take(self, rows: Iterable[Sequence[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Check the next rows (as ``ROW_COLUMNS``); yield the numbers and bodies of those that can be read."""
        for seq, prev, stored, raw, kind, unit, run_id, tenant_id, ref in rows:
            self.rows += 1
            if type(seq) is not int or seq <= self.last:
                self._broken(seq if isinstance(seq, int) else 0, "order", "its number is not the next")
                continue
            body = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else _bytes(raw)
            if seq == self.last + 1 and prev == self.stored and row_hash(MAIN_PREFIX, seq, prev, body) == stored:
                self.last, self.stored, self.computed = seq, stored, stored
            else:
                self._link(seq, _bytes(prev), _bytes(stored), body)
            if seq in self.checkpoints:
                self._meet(seq, self.stored)
            fields = self._body(seq, body, raw)
            if fields is not None:
                get = fields.get
                said = (
                    get("kind"),
                    get("unit"),
                    get("run_id"),
                    get("tenant_id"),
                    get("decision_id") or get("tx_id") or get("event_id"),
                )
                copies = (kind, unit, run_id, tenant_id, ref)
                if said != copies:
                    self._columns(seq, said, copies)
                yield seq, fields

    def finish(self, heads: Sequence[Sequence[Any]]) -> None:
        """Compare the rows of ``journal_head`` (stream, size, hash) with where the chain ends."""
        main = [head for head in heads if head[0] == STREAM]
        for head in heads:
            if head[0] != STREAM:
                self.breaks.append(Break(str(head[0]), 0, "head", "a head of a stream that this journal does not have"))
        if not main:
            self._broken(self.last, "head", "the head is missing")
        else:
            self._head(*main[0][1:])
        for size in self.checkpoints.keys() - self.met:
            self._broken(size, "checkpoint", f"the journal ends at row {self.last}")

    def unreadable(self, error: Exception) -> None:
        """Note that nothing could be read behind the last row taken."""
        self._broken(self.last, "unreadable", str(error))

    def _head(self, size: Any, digest: Any) -> None:
        if type(size) is not int or size < self.last:
            self._broken(self.last, "head", f"the head says {size} rows")
        elif size > self.last:
            self._broken(self.last + 1, "tail", f"the head says {size} rows, the last one found is {self.last}")
        elif _bytes(digest) not in {self.stored, self.computed}:
            self._broken(size, "head", "the head holds another hash than the last row")

    def _link(self, seq: int, prev: bytes, stored: bytes, body: bytes) -> None:
        """Say what is wrong with the row's place in the chain, if anything is."""
        gap = seq != self.last + 1
        if gap:
            missing = f"rows {self.last + 1} to {seq - 1}" if seq > self.last + 2 else f"row {seq - 1}"
            self._broken(self.last + 1, "gap", f"{missing} missing")
        loose = not gap and prev not in {self.stored, self.computed}
        computed = row_hash(MAIN_PREFIX, seq, prev, body)
        if computed == stored:
            if loose:
                self._broken(seq, "prev", "it does not name its predecessor's hash")
        elif loose and row_hash(MAIN_PREFIX, seq, self.stored, body) == stored:
            self._broken(seq, "prev", "it names another predecessor than the one it was hashed with")
        elif loose and _moved(seq, prev, stored, body):
            self._broken(seq, "order", "it was hashed for another place")
        else:
            self._broken(seq, "hash", "its hash is not that of its content")
            if loose:
                self._broken(seq, "prev", "it does not name its predecessor's hash")
        self.last, self.stored, self.computed = seq, stored, computed

    def _body(self, seq: int, body: bytes, raw: Any) -> dict[str, Any] | None:
        try:
            fields = orjson.loads(body)
            canonical = isinstance(raw, str) and orjson.dumps(fields, option=orjson.OPT_SORT_KEYS) == body
        except (ValueError, TypeError) as error:
            self._broken(seq, "body", str(error))
            return None
        if not canonical or not isinstance(fields, dict):
            self._broken(seq, "body", "it is not a JSON object in canonical form")
        return fields if isinstance(fields, dict) else None

    def _columns(self, seq: int, said: Sequence[Any], copies: Sequence[Any]) -> None:
        for name, copy, original in zip(COLUMNS, copies, said, strict=True):
            if copy != original:
                self._broken(seq, f"column:{name}", f"it holds {copy!r}, the body {original!r}")

    def _meet(self, seq: int, digest: bytes) -> None:
        expected = self.checkpoints.get(seq)
        if expected is not None:
            self.met.add(seq)
            if expected != {digest.hex()}:
                self._broken(seq, "checkpoint", "its hash is not the one that was kept outside")

    def _broken(self, seq: int, kind: str, detail: str) -> None:
        self.breaks.append(Break(STREAM, seq, kind, detail))


def _moved(seq: int, prev: bytes, stored: bytes, body: bytes) -> bool:
    """Whether the row is intact but for its number, which was one nearby."""
    near = range(max(1, seq - _MOVED_AT_MOST), seq + _MOVED_AT_MOST + 1)
    return any(row_hash(MAIN_PREFIX, other, prev, body) == stored for other in near if other != seq)


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, (bytes, memoryview)) else b""
