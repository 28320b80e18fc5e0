"""Identifiers as a port: UUIDv7 (RFC 9562), W3C trace and span ids, from one generator that tests seed; named ones."""

from __future__ import annotations

import random
from collections.abc import Iterable
from hashlib import sha1
from uuid import UUID

from spine.kernel.clock import Clock


class Ids:
    """Makes ids; with a ``seed`` and a virtual clock the same ones every time.

    The generator is not a source of secrets: an id names, it never authorises.
    """

    def __init__(self, clock: Clock, seed: int | None = None) -> None:
        self._time_us = clock.time_us
        self._random = random.Random(seed)  # noqa: S311  ids name things, they protect nothing
        self._bits = self._random.getrandbits
        self._millisecond = -1
        self._prefix = ""

    def uuid(self) -> str:
        """A UUIDv7 in its 36-character form: sorts by millisecond."""
        millisecond = self._time_us() // 1000
        if millisecond != self._millisecond:
            text = f"{millisecond:012x}"
            self._millisecond, self._prefix = millisecond, f"{text[:8]}-{text[8:]}-7"
        bits = self._bits(74)
        variant = 0x8000 | (bits >> 12 & 0x3FFF)
        return f"{self._prefix}{bits & 0xFFF:03x}-{variant:04x}-{bits >> 26:012x}"

    def trace_id(self) -> str:
        """A W3C trace id: 32 hex characters, not all zero."""
        return f"{self._bits(128) | 1:032x}"

    def span_id(self) -> str:
        """A W3C span id: 16 hex characters, not all zero."""
        return f"{self._bits(64) | 1:016x}"

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high], for jitter."""
        return self._random.uniform(low, high)


def named(namespace: str, names: Iterable[str]) -> list[str]:
    """The UUIDv5 of each name in a namespace. Raises ValueError when that is not a UUID."""
    space = UUID(namespace).bytes
    return [_version_5(sha1(space + name.encode(), usedforsecurity=False).hexdigest()) for name in names]


def _version_5(digest: str) -> str:
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"
