"""From units of work to what one SQL transaction writes: canonical bodies, the chain, and projections in groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

import orjson

from spine.governance.units import RECORD_GUARD, CommitOutcome, Committed, GuardFailed, StaleEpoch, Unit, Write
from spine.journal.chain import MAIN_PREFIX, STREAM
from spine.journal.faults import UnitFault
from spine.journal.projections import MAKERS
from spine.journal.statements import Params, Statement

# Their few fields that reach a column are plain text wherever they are made.
_PLAIN_KINDS: Final = frozenset({"decision", "outcome"})
# The member, if any, inside which more of these kinds reaches a column than their own plain members.
_NESTED: Final = {
    "run.started": "expectations",
    "tx.step": "rows",
    "tx.committed": None,
    "tx.aborting": None,
    "tx.aborted": None,
    "ack": None,
    "event": None,
    "event.published": "event_ids",
}
_EXACT: Final = frozenset({str, int, bool, type(None), dict, list})

# One record as it will be stored, but for its place: fields, raw body, body, kind, run_id, tenant_id, ref.
Entry = tuple[dict[str, Any], bytes, str, str, str | None, str | None, str | None]


@dataclass(slots=True)
class Encoded:
    """A unit whose records are canonical JSON."""

    id: str
    entries: list[Entry]
    writes: Sequence[Write]
    epoch: int | None


@dataclass(frozen=True, slots=True)
class Head:
    """Where the chain ends, and the governance epoch there."""

    size: int
    hash: bytes
    epoch: int


def encode(unit: Unit) -> Encoded | GuardFailed:
    """``unit`` as canonical JSON, or why it can never be written."""
    entries: list[Entry] = []
    try:
        for record in unit.records:
            fields = {**record.fields, "kind": record.kind, "at": record.at, "unit": unit.id}
            raw = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
            if record.kind not in _PLAIN_KINDS and not _exact(record.kind, fields):
                # What the projections see is what verify will read.
                fields = orjson.loads(raw)
            get = fields.get
            run_id, tenant_id = get("run_id"), get("tenant_id")
            ref = get("decision_id") or get("tx_id") or get("event_id")
            for copied in (run_id, tenant_id, ref):
                if copied is not None and not isinstance(copied, str):
                    raise TypeError(f"{record.kind}: {copied!r} is not text")
            entries.append((fields, raw, raw.decode(), record.kind, run_id, tenant_id, ref))
    except (TypeError, ValueError, RecursionError) as error:
        return GuardFailed(f"{RECORD_GUARD}{error}", 1, 0)
    if not entries:
        return GuardFailed(f"{RECORD_GUARD}a unit without records leaves no trace; give it one", 1, 0)
    return Encoded(unit.id, entries, unit.writes, unit.epoch)


def _exact(kind: str, fields: Mapping[str, Any]) -> bool:
    """Whether JSON surely gives back just the values that the kind's projections look at, subclasses being others."""
    if kind not in _NESTED or not _EXACT.issuperset(map(type, fields.values())):
        return False
    nested = _NESTED[kind]
    waiting: list[Any] = [] if nested is None else [fields.get(nested)]
    for value in waiting:
        if type(value) is dict:
            waiting += value.values()
        elif type(value) is list:
            waiting += value
        elif type(value) not in _EXACT:
            return False
    return True


class Waves:
    """Projection changes grouped by statement, so that running them by rank equals running them in journal order.

    A change that would overtake an earlier one of the same row begins a new wave.
    """

    def __init__(self) -> None:
        self._done: list[dict[Statement, dict[Any, Params]]] = []
        self._groups: dict[Statement, dict[Any, Params]] = {}
        self._ranks: dict[tuple[str, Any], int] = {}

    def add(self, statement: Statement, params: Params) -> None:
        """Take one change, later than all before it."""
        key = statement.key(params)
        place = (statement.table, key)
        rank = self._ranks.get(place)
        if rank is not None:
            undone = self._groups.get(statement.undoes) if statement.undoes is not None else None
            if undone is not None and undone.pop(key, None) is not None:
                del self._ranks[place]
                return
            if rank >= statement.rank:
                self._done.append(self._groups)
                self._groups, self._ranks = {}, {}
        self._ranks[place] = statement.rank
        group = self._groups.get(statement)
        if group is None:
            group = self._groups[statement] = {}
        group[key] = params

    def __iter__(self) -> Iterator[tuple[Statement, Sequence[Params]]]:
        """The statements with their rows, in the order in which they must run."""
        for groups in (*self._done, self._groups):
            for statement in sorted(groups, key=_rank):
                rows = groups[statement]
                if rows:
                    yield statement, list(rows.values())


def _rank(statement: Statement) -> int:
    return statement.rank


@dataclass(slots=True)
class Plan:
    """What one SQL transaction writes, and how each unit of it ends if it commits."""

    size: int
    hash: bytes
    epoch: int
    rows: list[Params] = field(default_factory=list)
    waves: Waves = field(default_factory=Waves)
    writes: list[Write] = field(default_factory=list)
    outcomes: list[CommitOutcome] = field(default_factory=list)

    @property
    def head(self) -> Head:
        """Where the chain ends after it."""
        return Head(self.size, self.hash, self.epoch)


def plan(units: Sequence[Encoded], head: Head) -> Plan:
    """Put ``units`` behind ``head`` in their order; raise UnitFault when a record's fields do not fit its kind."""
    made = Plan(head.size, head.hash, head.epoch)
    for unit in units:
        if unit.epoch is not None and unit.epoch < made.epoch:
            made.outcomes.append(StaleEpoch(made.epoch))
            continue
        first = made.size + 1
        for entry in unit.entries:
            _append(made, unit.id, entry)
        made.writes.extend(unit.writes)
        made.outcomes.append(Committed(first, made.size))
    return made


def _append(made: Plan, unit: str, entry: Entry) -> None:
    fields, raw, body, kind, run_id, tenant_id, ref = entry
    seq, prev = made.size + 1, made.hash
    digest = sha256(MAIN_PREFIX + seq.to_bytes(8, "big") + prev + raw).digest()
    made.rows.append((STREAM, seq, prev, digest, body, kind, unit, run_id, tenant_id, ref))
    made.size, made.hash = seq, digest
    maker = MAKERS.get(kind)
    if maker is None:
        return
    try:
        for statement, params in maker(fields, seq):
            made.waves.add(statement, params)
        if kind == "governance.changed":
            made.epoch = fields["epoch"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"missing field {error}" if isinstance(error, KeyError) else str(error)
        raise UnitFault(f"{RECORD_GUARD}{kind}: {reason}", 1, 0) from error
