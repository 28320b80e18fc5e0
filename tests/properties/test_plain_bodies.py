"""What the projections are made from is what ``verify`` will read, whatever a record's fields are made of."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spine.governance.units import Record, Unit
from spine.journal.batch import _NESTED, Encoded, Head, Waves, encode, plan
from spine.journal.chain import GENESIS
from spine.journal.faults import UnitFault
from spine.journal.projections import projections
from tests.unit import journal_kit as kit

pytestmark = pytest.mark.timeout(120)


class Word(enum.StrEnum):
    LOCAL = "LOCAL"
    EXTERNAL = "EXTERNAL"
    SPELLED = "spelled"


class Number(enum.IntEnum):
    NONE = 0
    TWO = 2


class Thing(enum.Enum):
    """True in Python, false in JSON."""

    FALSY = 0
    NAMELESS = ""
    NULL = None


class Odd(str):
    """Text that says it is something else."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return not str.__eq__(self, other)

    def __bool__(self) -> bool:
        return not len(self)

    __hash__ = str.__hash__


class Offset(int):
    def __mul__(self, other: object) -> int:
        return -1

    __rmul__ = __mul__


class Other(dict[str, Any]):
    def get(self, key: str, default: Any = None) -> Any:
        return "other"

    def __getitem__(self, key: str) -> Any:
        return "other"


class Longer(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([*super().__iter__(), "more"])


@dataclass
class Promise:
    domain: str = "incidents"
    action: str = "create_incident"
    deadline_s: int = 30


VALUES = st.one_of(
    st.sampled_from([*Word, *Number, *Thing]),
    st.text(max_size=3).map(Odd),
    st.integers(-3, 3).map(Offset),
    st.builds(Promise),
    st.sampled_from([Other(a=1), Longer(["x"]), (), ("e",), [], {}, {"a": Odd("LOCAL")}, [Number.TWO], [Other()]]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.integers(-(2**64), 2**65),
    st.text(st.characters(), max_size=4),
    st.uuids(),
    st.just(dt.datetime(2026, 1, 2, tzinfo=dt.UTC)),
    st.just(uuid.UUID(int=1)),
)
PROMISE = {"domain": "incidents", "action": "create_incident", "deadline_s": 30}
RECORDS = [
    kit.started(expectations=[PROMISE]),
    kit.started(implicit=True),
    kit.begun("tx-1"),
    kit.step("tx-1", rows=[kit.incident("incident-1")]),
    kit.acknowledged("tx-1"),
    kit.event("e-1", "tx-1"),
    kit.published("e-1", "e-2"),
    kit.committed("tx-1"),
    kit.aborting("tx-1"),
    kit.aborted("tx-1"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every member of a body, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in items:
        yield (*path, key)
        yield from places(member, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another member at that place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A record of some kind with up to three members, at any depth, replaced by something odd."""
    record = draw(st.sampled_from(RECORDS))
    fields = orjson.loads(orjson.dumps(record.fields))
    for _ in range(draw(st.integers(1, 3))):
        found = [path for path in places(fields) if not isinstance(path[-1], Odd)]
        fields = changed(fields, draw(st.sampled_from(found)), draw(VALUES)) if found else fields
    return Record(record.kind, record.at, fields)


def described(waves: Waves) -> list[Any]:
    """The changes, with the exact type of every value; a list or an object fits no column, whatever is in it."""
    return [
        (statement, [[(type(value), None if type(value) in (list, dict) else value) for value in row] for row in rows])
        for statement, rows in waves
    ]


def as_read(body: bytes) -> list[Any] | str:
    """What ``verify`` makes of a stored body."""
    waves = Waves()
    try:
        for statement, params in projections(orjson.loads(body), 1):
            waves.add(statement, params)
    except (AttributeError, LookupError, TypeError, ValueError):
        return "unfit"
    return described(waves)


def as_written(unit: Encoded) -> list[Any] | str:
    try:
        return described(plan([unit], Head(0, GENESIS, 1)).waves)
    except UnitFault:
        return "unfit"


@given(records())
@settings(max_examples=1_000, deadline=None)
def test_what_is_written_beside_the_journal_is_what_its_stored_body_says(record: Record) -> None:
    encoded = encode(Unit("unit", [record]))
    if isinstance(encoded, Encoded):
        ((_, raw, text, _, *copied),) = encoded.entries
        assert as_written(encoded) == as_read(raw)
        stored = orjson.loads(raw)
        said = (stored.get("run_id"), stored.get("tenant_id"))
        ref = stored.get("decision_id") or stored.get("tx_id") or stored.get("event_id")
        assert [(type(value), value) for value in copied] == [(type(value), value) for value in (*said, ref)]
        assert text.encode() == raw


def test_records_as_the_actors_make_them_need_no_second_look() -> None:
    """The fields themselves are kept, so that the check above is about something."""
    kept = {
        record.kind
        for record in RECORDS
        if (encoded := encode(Unit("unit", [record])))
        and isinstance(encoded, Encoded)
        and any(value is record.fields["run_id"] for value in encoded.entries[0][0].values())
    }
    assert kept == set(_NESTED)
