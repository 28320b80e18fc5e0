"""Text that is shown on a terminal or in a log: no recorded value can forge a line of it or move its cursor."""

from __future__ import annotations

import unicodedata
from typing import Any, Final

_LONGEST: Final = 500
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(value: Any, *, longest: int = _LONGEST) -> str:
    """Return ``value`` on one line with control, bidi and other invisible characters escaped; ``None`` is unknown."""
    if value is None:
        return "unknown"
    text = str(value)
    cut = f"... ({len(text)} characters, whole with --json)" if len(text) > longest else ""
    return "".join(_escaped(char) for char in text[:longest]) + cut


def _escaped(char: str) -> str:
    if char.isascii() and char.isprintable():
        return char
    if unicodedata.category(char) not in _UNSAFE:
        return char
    code = ord(char)
    if code <= 0xFF:
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
