"""Which tables a statement writes to, as far as its text tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

_TOKEN: Final = re.compile(
    r"""--[^\n]*|/\*.*?\*/|(?P<quoted>"(?:[^"]|"")*"|'(?:[^']|'')*'|`[^`]*`|\[[^\]]*\])|(?P<word>[^\W\d][\w$]*|\S)""",
    re.DOTALL,
)
_QUOTE: Final = '"'
_BEFORE_NAME: Final = frozenset({"only", "("})


def targets(sql: str) -> Iterator[tuple[str, str]]:
    """Schema (empty if none is named) and name of each table that ``sql`` changes, in lower case.

    What triggers, rules or functions of the database change beside it is not seen.
    """
    words = [
        _QUOTE + match.group()[1:-1].lower() if match.lastgroup == "quoted" else match.group().lower()
        for match in _TOKEN.finditer(sql)
        if match.lastgroup is not None
    ]
    for at, word in enumerate(words, start=1):
        if word == "into" or (word == "from" and words[at - 2 : at - 1] == ["delete"]):
            yield _named(words, at)
        elif word == "update":
            yield _named(words, at + 2 if words[at : at + 1] == ["or"] else at)


def _named(words: list[str], at: int) -> tuple[str, str]:
    """The name that begins there: its last part, and the one before it."""
    while at < len(words) and words[at] in _BEFORE_NAME:
        at += 1
    parts = ["", *words[at : at + 1]]
    while words[at + 1 : at + 2] == ["."] and at + 2 < len(words):
        at += 2
        parts.append(words[at])
    schema, name = ["", *parts][-2:]
    return schema.lstrip(_QUOTE), name.lstrip(_QUOTE)
