"""What a record can hold of foreign data: a mapping as JSON, and as the journal gives it back."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import orjson

from spine.governance.params import PARAMS_MOST_BYTES, InvalidParams, detached, plain


def recordable(data: Mapping[str, Any]) -> bytes:
    """A mapping as the JSON under which it is recorded; raises ValueError saying why it cannot be."""
    try:
        encoded = orjson.dumps(detached(data), default=plain)
    except (InvalidParams, TypeError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if len(encoded) > PARAMS_MOST_BYTES:
        raise ValueError(f"is {len(encoded)} bytes as JSON, at most {PARAMS_MOST_BYTES} are kept")
    return encoded


def recorded(given: object) -> dict[str, Any]:
    """A mapping as the journal gives it back; raises TypeError or ValueError saying why it cannot, or not as it was."""
    if not isinstance(given, Mapping):
        raise TypeError("is not a mapping")
    encoded = recordable(given)
    # What is not finite is written as null.
    if b"null" in encoded and not _finite(detached(given)):
        raise ValueError("is not JSON (it holds a number that is not finite)")
    found: dict[str, Any] = orjson.loads(encoded)
    return found


def copied(value: Any) -> Any:
    """An own copy of what a record holds: plain JSON, which its receiver may change."""
    return orjson.loads(orjson.dumps(value))


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list) else not isinstance(value, float) or isfinite(value)
