"""Identifiers as a port: UUIDv7 (RFC 9562), W3C trace and span ids, from one generator that tests seed."""

from __future__ import annotations

import random

from spine.kernel.clock import Clock

_VERSION_AND_VARIANT = (0x7 << 76) | (0x2 << 62)


class Ids:
    """Makes ids; with a ``seed`` and a virtual clock the same ones every time.

    The generator is not a source of secrets: an id names, it never authorises.
    """

    def __init__(self, clock: Clock, seed: int | None = None) -> None:
        self._time_us = clock.time_us
        self._random = random.Random(seed)  # noqa: S311  ids name things, they protect nothing
        self._bits = self._random.getrandbits

    def uuid(self) -> str:
        """A UUIDv7 in its 36-character form: sorts by millisecond."""
        bits = self._bits(76)
        high = (self._time_us() // 1000) << 80
        value = high | _VERSION_AND_VARIANT | ((bits >> 62 & 0xFFF) << 64) | (bits & ((1 << 62) - 1))
        text = f"{value:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def trace_id(self) -> str:
        """A W3C trace id: 32 hex characters, not all zero."""
        return f"{self._bits(128) | 1:032x}"

    def span_id(self) -> str:
        """A W3C span id: 16 hex characters, not all zero."""
        return f"{self._bits(64) | 1:016x}"

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high], for jitter."""
        return self._random.uniform(low, high)
