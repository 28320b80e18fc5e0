"""One line of a recorded file: checked at the edge, or refused with the reason."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from spine.governance.operations import NAME
from spine.governance.params import id_problem, text_problem

LINE_MOST_BYTES = 1 << 20
_READ_BYTES = len(BOM_UTF8) + LINE_MOST_BYTES + len(b"\r\n")
_NAME_MOST = 200
_SHOWN_PROBLEMS = 5


class BadLine(ValueError):
    """A line that cannot be replayed; ``run_id`` and ``is_operation`` say what it would have been, where it tells."""

    def __init__(self, reason: str, *, run_id: str | None = None, is_operation: bool = False) -> None:
        super().__init__(reason)
        self.run_id = run_id
        self.is_operation = is_operation


def _id(value: str) -> str:
    if problem := id_problem("it", value):
        raise ValueError(problem)
    return value


def _name(value: str) -> str:
    if not NAME.fullmatch(value) or len(value) > _NAME_MOST:
        raise ValueError("an operation is named domain.action, of letters, digits, - and _")
    return value


Id = Annotated[str, AfterValidator(_id)]


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    run_id: Id


class RunStarted(_Line):
    """A run begins."""

    type: Literal["run.started"]
    tenant_id: Id
    agent_id: Id | None = None


class RecordedOutcome(BaseModel):
    """How the operation ended when it was recorded; fields beside these are the data of its reply."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    success: bool
    error: str | None = None
    error_code: str | None = None

    @model_validator(mode="after")
    def _failure_says_why(self) -> RecordedOutcome:
        if not self.success and not self.error:
            raise ValueError("a failure needs its error")
        return self

    @property
    def data(self) -> dict[str, Any]:
        """What a successful operation replied."""
        return dict(self.model_extra or {})


class RecordedOperation(_Line):
    """An operation as it was called, with its recorded outcome."""

    type: Literal["operation"]
    operation: Annotated[str, AfterValidator(_name)]
    tenant_id: Id | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    outcome: RecordedOutcome


class RunCompleted(_Line):
    """A run is over."""

    type: Literal["run.completed"]
    run_status: Id
    tenant_id: Id | None = None
    agent_id: Id | None = None
    error_code: Id | None = None
    error_message: str | None = None


Line = RunStarted | RecordedOperation | RunCompleted
_TYPES = ("run.started", "operation", "run.completed")
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="type")])


@dataclass(slots=True)
class NumberedLine:
    """The bytes of one line (without its end) and its number, from 1; ``oversize`` lines carry no bytes."""

    number: int
    raw: bytes
    oversize: bool = False


def read_lines(file: BinaryIO) -> Iterator[NumberedLine]:
    """Read a file line by line, skipping blank ones and never holding much more than ``LINE_MOST_BYTES`` of one."""
    number = 0
    while raw := file.readline(_READ_BYTES):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM_UTF8)
        ended = raw.endswith(b"\n")
        if len(raw.rstrip(b"\r\n")) > LINE_MOST_BYTES:
            while not ended and (rest := file.readline(LINE_MOST_BYTES)):
                ended = rest.endswith(b"\n")
            yield NumberedLine(number, b"", oversize=True)
        elif raw.strip():
            yield NumberedLine(number, raw.rstrip(b"\r\n"))


def parse(line: NumberedLine) -> Line:
    """Return the checked line; raises ``BadLine`` with the reason, naming every field that is wrong and its value."""
    if line.oversize:
        raise BadLine(f"longer than {LINE_MOST_BYTES} bytes")
    found = _load(line.raw)
    if not isinstance(found, dict):
        raise BadLine(f"not a JSON object but {_json_type(found)}")
    run_id = found.get("run_id")
    kind = found.get("type")
    try:
        if kind not in _TYPES:
            known = ", ".join(_TYPES)
            raise BadLine(f"type {_shown(kind)} is none of {known}" if "type" in found else "field type is missing")
        if problem := _text_problem(found):
            raise BadLine(problem, run_id=_as_id(run_id), is_operation=kind == "operation")
        return _LINE.validate_python(found)
    except ValidationError as error:
        raise BadLine(_problems(error), run_id=_as_id(run_id), is_operation=kind == "operation") from None
    except RecursionError:
        raise BadLine("nested too deeply", run_id=_as_id(run_id), is_operation=kind == "operation") from None


def _load(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float)
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise BadLine("nested too deeply") from None
    except ValueError as error:
        raise error if isinstance(error, BadLine) else BadLine(f"not JSON: {str(error).split(';')[0]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadLine(f"field {_shown(twice)} is given more than once")
    return found


def _refuse_constant(name: str) -> Any:
    raise BadLine(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadLine(f"number {_shown(text)} is too large")
    return value


def _text_problem(value: Any) -> str | None:
    """What text, at any depth, cannot be stored."""
    if isinstance(value, str):
        problem = text_problem(value)
        return f"text {_shown(value)} {problem}" if problem else None
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for item in inner:
        if problem := _text_problem(item):
            return problem
    return None


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    shown = []
    for problem in found[:_SHOWN_PROBLEMS]:
        where = ".".join(str(part) for part in problem["loc"][1:] or problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            shown.append(f"field {where} is missing")
        else:
            shown.append(f"field {where}: {message[:1].lower()}{message[1:]}, not {_shown(problem['input'])}")
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _as_id(value: Any) -> str | None:
    return value if isinstance(value, str) and id_problem("run_id", value) is None else None


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}.get(type(value), "a number")
