"""A line of a recorded file is taken whole or refused with its reason."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spine.replay.ledger import RunLedger
from spine.replay.lines import (
    LINE_MOST_BYTES,
    BadLine,
    NumberedLine,
    RecordedOperation,
    RunCompleted,
    RunStarted,
    parse,
    read_lines,
)

STARTED = {"type": "run.started", "run_id": "r1", "tenant_id": "acme", "agent_id": "a7"}
OPERATION = {
    "type": "operation",
    "run_id": "r1",
    "operation": "airline.calculate",
    "params": {"expression": "1 + 1"},
    "outcome": {"success": True, "result_bytes": 1},
}
COMPLETED = {"type": "run.completed", "run_id": "r1", "run_status": "failed", "error_code": "X", "error_message": "no"}


def parsed(value: Any) -> Any:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse(NumberedLine(1, raw))


def refusal(value: Any) -> BadLine:
    with pytest.raises(BadLine) as caught:
        parsed(value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000
    return caught.value


def test_the_three_kinds_of_line_are_taken() -> None:
    started = parsed({**STARTED, "task_id": 0, "trial": 0})
    assert isinstance(started, RunStarted)
    assert (started.run_id, started.tenant_id, started.agent_id) == ("r1", "acme", "a7")
    operation = parsed(OPERATION)
    assert isinstance(operation, RecordedOperation)
    assert operation.params == {"expression": "1 + 1"}
    assert operation.outcome.data == {"result_bytes": 1}
    completed = parsed(COMPLETED)
    assert isinstance(completed, RunCompleted)
    assert (completed.run_status, completed.error_code, completed.error_message) == ("failed", "X", "no")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{", "not JSON: "),
        (b"{'a': 1}", "not JSON: "),
        (b"[1, 2]", "not a JSON object but a list"),
        (b"null", "not a JSON object but null"),
        (b"3", "not a JSON object but a number"),
        (b'"x"', "not a JSON object but a text"),
        (b'{"type": "run.started"} trailing', "not JSON: "),
        (b'{"a": "\xff"}', "not UTF-8: "),
        (b"{}", "field type is missing"),
        (
            b'{"type": "run.paused", "run_id": "r"}',
            "type 'run.paused' is none of run.started, operation, run.completed",
        ),
        (b'{"type": ["operation"], "run_id": "r"}', "type ['operation'] is none of"),
        (b'{"type": "operation", "x": NaN}', "NaN is not a JSON number"),
        (b'{"type": "operation", "x": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"type": "operation", "x": 1e999}', "number '1e999' is too large"),
        (b'{"type": "operation", "x": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b'{"type": "operation", "type": "operation"}', "field 'type' is given more than once"),
        (b'{"type": "operation", "params": {"a": 1, "a": 2}}', "field 'a' is given more than once"),
        (b'{"type": "run.started", "run_id": "\\ud800"}', "holds a lone surrogate"),
        (b'{"type": "operation", "params": {"\\udfff": [1]}}', "holds a lone surrogate"),
        (b'{"type": "operation", "params": {"a": ["x\\u0000"]}}', "holds a NUL character"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_a_line_is_refused(value: bytes, reason: str) -> None:
    assert reason in str(refusal(value))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"run_id": None}, "field run_id: input should be a valid string, not None"),
        ({"run_id": 7}, "field run_id: input should be a valid string, not 7"),
        ({"run_id": ""}, "is empty"),
        ({"run_id": "x" * 600}, "600 characters"),
        ({"run_id": "a\nb"}, "control character"),
        ({"operation": "calculate"}, "field operation: an operation is named domain.action"),
        ({"operation": "a.b; drop"}, "field operation: "),
        ({"params": [1]}, "field params: input should be a valid dictionary, not [1]"),
        ({"outcome": None}, "field outcome: "),
        ({"outcome": {}}, "field outcome.success is missing"),
        ({"outcome": {"success": 1}}, "field outcome.success: input should be a valid boolean, not 1"),
        ({"outcome": {"success": False}}, "field outcome: a failure needs its error"),
        ({"outcome": {"success": False, "error": 5}}, "field outcome.error: "),
    ],
)
def test_wrong_fields_are_named_with_their_value(change: dict[str, Any], reason: str) -> None:
    assert reason in str(refusal({**OPERATION, **change}))


def test_every_wrong_field_is_named() -> None:
    text = str(refusal({"type": "run.started", "run_id": 5, "agent_id": []}))
    assert "field run_id: " in text
    assert "field tenant_id is missing" in text
    assert "field agent_id: " in text


def test_a_refused_operation_still_tells_its_run() -> None:
    bad = refusal({**OPERATION, "outcome": {}})
    assert (bad.run_id, bad.is_operation) == ("r1", True)
    assert refusal({**OPERATION, "run_id": 5}).run_id is None
    assert refusal({**COMPLETED, "run_status": 5}).is_operation is False


def test_lines_are_numbered_as_an_editor_numbers_them() -> None:
    file = io.BytesIO(b"one\n\n  \r\ntwo\r\nlast")
    assert [(line.number, line.raw) for line in read_lines(file)] == [(1, b"one"), (4, b"two"), (5, b"last")]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    longest = b'"' + b"x" * (LINE_MOST_BYTES - 2) + b'"'
    lines = list(read_lines(io.BytesIO(b"\xef\xbb\xbf" + longest + b"\r\n\xef\xbb\xbftwo\n")))
    assert [(line.number, line.oversize) for line in lines] == [(1, False), (2, False)]
    assert [line.raw for line in lines] == [longest, b"\xef\xbb\xbftwo"]


def test_an_oversize_line_is_refused_without_losing_the_next() -> None:
    exact = json.dumps({**STARTED, "pad": ""}).encode()
    exact = exact[:-2] + b"x" * (LINE_MOST_BYTES - len(exact)) + exact[-2:]
    assert len(exact) == LINE_MOST_BYTES
    over = exact[:-2] + b"x" + exact[-2:]
    huge = b"y" * (3 * LINE_MOST_BYTES)
    file = io.BytesIO(b"\n".join([exact, over, huge, exact + b"\r", over]))
    lines = list(read_lines(file))
    assert [(line.number, line.oversize) for line in lines] == [(1, False), (2, True), (3, True), (4, False), (5, True)]
    assert isinstance(parse(lines[0]), RunStarted)
    assert isinstance(parse(lines[3]), RunStarted)
    assert all(line.raw == b"" for line in lines if line.oversize)
    with pytest.raises(BadLine, match="longer than 1048576 bytes"):
        parse(lines[1])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from([*OPERATION, *COMPLETED, *STARTED]), json_values).map(
            lambda change: json.dumps({**OPERATION, **change}).encode()
        ),
    )
)
def test_any_line_is_taken_or_refused_in_one_readable_line(raw: bytes) -> None:
    try:
        told = repr(parsed(raw))
    except BadLine as bad:
        told = str(bad)
    assert told.isprintable()


def test_the_ledger_counts_operations_by_run() -> None:
    ledger = RunLedger()
    assert ledger.start("r1", "acme") is None
    assert [ledger.next_ordinal("r1"), ledger.next_ordinal("r2"), ledger.next_ordinal("r1")] == [1, 1, 2]
    assert ledger.tenant("r1") == "acme"
    assert ledger.tenant("r2") is None
    assert ledger.start("r2", "umbrella") is None
    assert ledger.next_ordinal("r2") == 2
    assert ledger.start("r1", "other") == "acme"
    ledger.touch("r0")
    ledger.touch("r1")
    assert list(ledger.run_ids()) == ["r0", "r1", "r2"]
    assert ledger.tenant("r1") == "acme"
    ledger.close()
