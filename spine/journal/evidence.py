"""Whether what is shown of a run is what was recorded, and all of it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from typing import Any, Final

import orjson

from spine.journal.chain import GENESIS, MAIN_PREFIX, STREAM, row_hash
from spine.journal.engine import lenient
from spine.journal.reading import Reading
from spine.journal.rows import HeadRow, Row, RunRow
from spine.kernel.errors import JournalBroken

MAIN: Final = f"stream = '{STREAM}'"
ROW: Final = "seq, prev, hash, body"
_NO_LINK: Final = (b"", b"")
_IDS: Final = 400
_RANGE: Final = 20_000


def columns(shape: type) -> str:
    """The columns that a row of this shape is made from."""
    return ", ".join(field.name for field in fields(shape))


class Evidence(Reading):
    """Looks a run up, and checks its rows against the chain; every method may raise JournalError."""

    async def head(self) -> HeadRow:
        """Where the chain ends."""
        found = await self._all(f"SELECT size, hash FROM journal_head WHERE {MAIN}")
        if not found:
            raise JournalBroken(f"the journal at {self._target.name} has lost its head: run `spine verify`")
        return HeadRow(found[0][0], bytes(found[0][1]))

    async def run(self, run_id: str) -> RunRow | None:
        """The run, if it was started."""
        found = await self._all(f"SELECT {columns(RunRow)} FROM runs WHERE run_id = ?", run_id)
        return run_of(found[0]) if found else None

    async def run_evidence(self, run_id: str, rows: Sequence[Row]) -> bool:
        """Whether ``rows`` are the run's, none of them was changed, and none is missing between the first and the last.

        Seen is whatever ``bound`` sees, a row of another run among them, a gap between them, and a row between them
        that tells of the run though its columns do not; where the run's start or completion is known, from there and
        up to there. Not seen is what lacks after the last row, and what was hidden by changing its body too: ``spine
        verify`` sees it. It reads every row in between, about a second for a million of them.
        """
        if not all(row.body.get("run_id") == run_id for row in rows) or not await self.bound(rows):
            return False
        run, places = await self.run(run_id), [row.seq for row in rows]
        if run is not None:
            places += [place for place in (run.started_seq, run.completed_seq) if isinstance(place, int)]
        return not places or await self._whole(run_id, min(places), max(places))

    async def _whole(self, run_id: str, first: int, last: int) -> bool:
        """Whether no row from ``first`` to ``last`` is missing, or hidden from the run that its body names."""
        # A backslash escapes on PostgreSQL alone; in its place stands any character, as for the other wildcards.
        named = f"%{orjson.dumps({'run_id': run_id})[1:-1].decode()}%".replace("\\", "_")
        for at in range(first, last + 1, _RANGE):
            ends = at, min(at + _RANGE - 1, last)
            there = f"FROM journal WHERE {MAIN} AND seq BETWEEN ? AND ?"
            ((found,),) = await self._scan(f"SELECT count(*) {there}", *ends)
            if found != ends[1] - at + 1:
                return False
            strange = f"SELECT {ROW} {there} AND (run_id IS NULL OR run_id <> ?) AND body LIKE ?"
            if any(row_of(row).body.get("run_id") == run_id for row in await self._scan(strange, *ends, run_id, named)):
                return False
        return True

    async def bound(self, rows: Sequence[Row]) -> bool:
        """Whether each row's hash is right, binds its predecessor, and is bound by its successor or the head."""
        if any(row_hash(MAIN_PREFIX, row.seq, row.prev, _stored(row.raw)) != row.hash for row in rows):
            return False
        links = await self._links({seq for row in rows for seq in (row.seq - 1, row.seq + 1) if seq > 0})
        head = await self.head()
        # Rows may have been appended between the two looks.
        links |= await self._links({row.seq + 1 for row in rows if row.seq < head.size} - links.keys())
        for row in rows:
            before = GENESIS if row.seq == 1 else links.get(row.seq - 1, _NO_LINK)[1]
            after = head.hash if row.seq == head.size else links.get(row.seq + 1, _NO_LINK)[0]
            if row.prev != before or row.hash != after:
                return False
        return True

    async def _links(self, seqs: AbstractSet[int]) -> dict[int, tuple[bytes, bytes]]:
        """``prev`` and ``hash`` of the rows that exist."""
        found, wanted = {}, sorted(seqs)
        for at in range(0, len(wanted), _IDS):
            some = wanted[at : at + _IDS]
            marks = ",".join("?" * len(some))
            sql = f"SELECT seq, prev, hash FROM journal WHERE {MAIN} AND seq IN ({marks})"
            found.update({seq: (_bytes(prev), _bytes(digest)) for seq, prev, digest in await self._all(sql, *some)})
        return found


def _stored(raw: str) -> bytes:
    return raw.encode("utf-8", "surrogateescape")


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, (bytes, memoryview)) else b""


def row_of(values: Sequence[Any]) -> Row:
    """A journal row as read; a body that is no JSON object is empty."""
    seq, prev, digest, raw = values
    if not isinstance(raw, str):
        raw = lenient(_bytes(raw))
    try:
        body = orjson.loads(raw)
    except ValueError:
        body = {}
    return Row(seq, _bytes(prev), _bytes(digest), body if isinstance(body, dict) else {}, raw)


def run_of(values: Sequence[Any]) -> RunRow:
    """A run as read: SQLite has numbers for truth values."""
    run = RunRow(*values)
    return run if isinstance(run.implicit, bool) else replace(run, implicit=bool(run.implicit))
