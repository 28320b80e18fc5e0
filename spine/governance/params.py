"""Parameters at the edge: what can be recorded, its digest, what is masked, and the read-only view handed to rules."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from decimal import Decimal
from typing import Any

import orjson
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError

from spine.kernel.errors import SpineError

PARAMS_MOST_BYTES = 1 << 20
DEPTH_MOST = 64
VALUES_MOST = 100_000
ID_MOST = 512
MASK = "**********"
_MASK = MASK.encode()
_SAFE_INT = 1 << 53


class InvalidParams(SpineError):
    """Parameters that cannot be accepted; ``told`` may show values to the caller, ``recorded`` never does."""

    def __init__(self, told: str, recorded: str) -> None:
        super().__init__(told)
        self.told = told
        self.recorded = recorded

    def __reduce__(self) -> tuple[type[InvalidParams], tuple[str, str]]:
        return (type(self), (self.told, self.recorded))


class Params(Mapping[str, Any]):
    """A read-only mapping that remembers which absent keys were asked for."""

    __slots__ = ("_missing", "_values")

    def __init__(self, values: dict[str, Any], missing: list[str]) -> None:
        self._values = values
        self._missing = missing

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            if key not in self._missing and len(self._missing) < 64:
                self._missing.append(str(key)[:200])
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Params({sorted(self._values)})"


@dataclass(slots=True)
class Accepted:
    """Parameters that passed: their private copy, the digest of their masked canonical JSON, and what was masked."""

    values: dict[str, Any]
    model: BaseModel | None
    digest: str
    masked: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    nested: bool = False

    def view(self, missing: list[str]) -> Params:
        """A fresh read-only view, so that nobody's change of a nested value reaches anybody else."""
        return Params(copied(self.values) if self.nested else self.values, missing)

    def audited(self, fields: tuple[str, ...] | None) -> dict[str, Any]:
        """What of the parameters is recorded: the named fields, secrets masked."""
        if not fields:
            return {}
        chosen = {name: self.values[name] for name in fields if name in self.values}
        loaded: dict[str, Any] = orjson.loads(orjson.dumps(chosen, default=plain))
        return loaded

    def scrub(self, text: str) -> str:
        """The text without any secret of these parameters, plain or as ``repr`` and ``ascii`` show it."""
        for secret in self.secrets:
            for shown in {secret, repr(secret)[1:-1], ascii(secret)[1:-1]}:
                text = text.replace(shown, MASK)
        return text


def accept(params: object, model: type[BaseModel] | None) -> Accepted:
    """Check parameters and take a private copy; raises ``InvalidParams`` naming every field that is wrong."""
    if params is None:
        params = {}
    if not isinstance(params, (Mapping, BaseModel)):
        raise _refused([("params", f"must be a mapping, not {type(params).__name__}", "")])
    try:
        sent = params.model_dump() if isinstance(params, BaseModel) else params
        values, secrets = _copied(sent), list[str]()
        text = _encode(values, secrets)
        if model is None:
            return _accepted(values, None, text, secrets)
        instance = model.model_validate(_copied(values))
        values, secrets = _copied(instance.model_dump()), []
        return _accepted(values, instance, _encode(values, secrets), secrets)
    except ValidationError as error:
        assert model is not None
        raise _refused(list(_model_problems(error, model))) from None
    except InvalidParams:
        raise
    except Exception as error:
        raise _refused([("params", f"could not be read: {type(error).__name__}", "")]) from error


def _copied(params: Mapping[Any, Any]) -> dict[str, Any]:
    """Plain containers that nobody else holds; raises ``InvalidParams`` naming every key and depth that is wrong."""
    copy = _Copy()
    values: dict[str, Any] = copy.of(params, "", 0)
    if copy.problems:
        raise _refused([*copy.problems, *_walk(values, "", 0)])
    return values


class _Copy:
    """Copies by hand and within bounds: a value that holds itself twice, level by level, has no end otherwise."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._left = VALUES_MOST

    def of(self, value: Any, path: str, depth: int) -> Any:
        """The value, its containers anew."""
        kind = type(value)
        if kind is str or kind is int or kind is float or kind is bool or value is None:
            return value
        if depth > DEPTH_MOST:
            self.problems.append((path[:200] or "params", f"nested more than {DEPTH_MOST} deep", ""))
            return None
        if isinstance(value, Mapping):
            return self._mapping(value, path, depth)
        if isinstance(value, (list, tuple)):
            self._count(len(value))
            return [self.of(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        if isinstance(value, BaseModel):
            return self.of(value.model_dump(), path, depth + 1)
        if is_dataclass(value) and not isinstance(value, type):
            return self.of({field.name: getattr(value, field.name) for field in fields(value)}, path, depth + 1)
        return value

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        self._count(len(value))
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str) or text_problem(key):
                self.problems.append((path or "params", f"has the key {ascii(key)[:80]}, keys must be plain text", ""))
            else:
                copy[key] = self.of(item, f"{path}.{key}" if path else key, depth + 1)
        return copy

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise _refused([("params", f"holds more than {VALUES_MOST} values", "")])


def _encode(values: dict[str, Any], secrets: list[str]) -> bytes:
    """The values as canonical JSON, secrets masked; the walk that names every problem happens on suspicion only."""

    def collect(value: Any) -> Any:
        if isinstance(value, SecretStr):
            secrets.append(value.get_secret_value())
        elif isinstance(value, SecretBytes):
            secrets.append(value.get_secret_value().decode("utf-8", "backslashreplace"))
        return plain(value)

    try:
        text = orjson.dumps(values, default=collect, option=orjson.OPT_SORT_KEYS | orjson.OPT_STRICT_INTEGER)
    except (TypeError, RecursionError) as error:
        raise _refused(list(_walk(values, "", 0)) or [("params", str(error), "")]) from None
    if len(text) > PARAMS_MOST_BYTES:
        raise _refused([("params", f"{len(text)} bytes as JSON, at most {PARAMS_MOST_BYTES} are taken", "")])
    if (b"null" in text or b"\\u0000" in text or text.count(b"[") + text.count(b"{") > DEPTH_MOST) and (
        problems := list(_walk(values, "", 0))
    ):
        raise _refused(problems)
    return text


def _accepted(values: dict[str, Any], model: BaseModel | None, text: bytes, secrets: list[str]) -> Accepted:
    masked = tuple(sorted(_masked_paths(values, ""))) if _MASK in text else ()
    nested = any(type(value) is dict or type(value) is list for value in values.values())
    return Accepted(
        values,
        model,
        hashlib.sha256(text).hexdigest(),
        masked,
        tuple(secret for secret in secrets if secret),
        nested,
    )


def copied(value: Any) -> Any:
    """The containers anew, their leaves the same."""
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) is list:
        return [copied(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """How a leaf that JSON does not know is written: secrets masked, decimals as text; raises ``TypeError``."""
    if isinstance(value, (SecretStr, SecretBytes)):
        return MASK
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _masked_paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, (SecretStr, SecretBytes)):
        yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _masked_paths(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _masked_paths(item, f"{path}[{index}]")


Problem = tuple[str, str, str]


def _walk(value: Any, path: str, depth: int) -> Iterator[Problem]:
    here = path or "params"
    if depth > DEPTH_MOST:
        yield here[:200], f"nested more than {DEPTH_MOST} deep", ""
    elif isinstance(value, str):
        problem = text_problem(value)
        if problem:
            yield here, problem, ascii(value)
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        if abs(value) >= _SAFE_INT:
            yield here, "an integer beyond 2**53 is not exact in JSON: send it as text", str(value)[:40]
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield here, "must be a finite number", repr(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or text_problem(key):
                yield here, f"has the key {ascii(key)[:80]}, keys must be plain text", ""
            else:
                yield from _walk(item, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]", depth + 1)
    else:
        try:
            orjson.dumps(value, default=plain)
        except (TypeError, RecursionError):
            yield here, f"is {type(value).__name__}, which is not JSON", ""


def text_problem(text: str) -> str | None:
    """Why this text cannot be stored, or ``None``."""
    if "\x00" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate, which is not Unicode text"
    return None


def _model_problems(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    for found in error.errors(include_url=False, include_context=False):
        path = ".".join(map(str, found["loc"])) or "params"
        field = model.model_fields.get(str(found["loc"][0])) if found["loc"] else None
        secret = field is not None and "Secret" in str(field.annotation)
        message = f"is not valid ({found['type']})" if secret else found["msg"]
        yield path, message, MASK if secret else ascii(found["input"]) if found["type"] != "missing" else ""


def _refused(problems: list[Problem]) -> InvalidParams:
    shown = problems[:20]
    more = f" (and {len(problems) - 20} more)" if len(problems) > 20 else ""
    told = "; ".join(f"{path}: {problem}" + (f" (got {value[:80]})" if value else "") for path, problem, value in shown)
    recorded = "; ".join(f"{path}: {problem}" for path, problem, _ in shown)
    return InvalidParams(_storable(told + more), _storable(recorded + more))


def _storable(text: str) -> str:
    return text if text_problem(text) is None else ascii(text)


def id_problem(name: str, value: object, *, optional: bool = False) -> str | None:
    """Why ``value`` cannot be the id called ``name``, or ``None``."""
    if value is None and optional:
        return None
    if not isinstance(value, str):
        return f"{name} must be text, not {type(value).__name__}"
    if not value.strip():
        return f"{name} {value!r} is empty: give it an id"
    if len(value) > ID_MOST:
        return f"{name} has {len(value)} characters, at most {ID_MOST} are taken"
    if problem := text_problem(value):
        return f"{name} {ascii(value)[:80]} {problem}"
    if not value.isprintable():
        return f"{name} {ascii(value)[:80]} holds a control character"
    return None


def detached(data: Mapping[str, Any]) -> dict[str, Any]:
    """A handler's data as plain containers that nobody else holds; raises ``InvalidParams`` when it cannot be JSON."""
    return _copied(data)
