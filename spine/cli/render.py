"""Output: JSON for programs, plain text for pipes, colours only for a terminal that wants them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

_STYLES = {"head": "bold", "good": "bold green", "bad": "red", "warn": "yellow", "dim": "dim"}


def styled(stream: IO[str]) -> bool:
    """Tell whether ``stream`` is a terminal whose user did not ask for plain text."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_json(value: Any, stream: IO[str] | None = None) -> None:
    """Print ``value`` as JSON, indented on a terminal; ASCII only: no recorded text reaches the terminal raw."""
    out = stream or sys.stdout
    print(json.dumps(value, indent=2 if out.isatty() else None), file=out)


class JsonItems:
    """A JSON array on stdout, one item a line, of which only one page is held at a time."""

    def __init__(self) -> None:
        self._separator = "["

    def add(self, items: Iterable[Any]) -> None:
        """Print some more items."""
        for item in items:
            print(self._separator + json.dumps(item), end="")
            self._separator = ",\n"

    def end(self) -> None:
        """Close the array."""
        print("]" if self._separator != "[" else "[]")


def print_lines(lines: Iterable[tuple[str, str]], stream: IO[str] | None = None) -> None:
    """Print (style, text) lines; the texts are expected to be printable already."""
    out = stream or sys.stdout
    if not styled(out):
        for _, line in lines:
            print(line, file=out)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, highlight=False, emoji=False, markup=False)
    for style, line in lines:
        console.print(Text(line, style=_STYLES.get(style, "")), soft_wrap=True)


def print_table(headers: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], *, header: bool = True) -> None:
    """Print (style, cells) rows in aligned columns, under their ``headers`` unless those were printed before."""
    widths = [max([len(name), *(len(cells[i]) for _, cells in rows)]) for i, name in enumerate(headers)]
    lines = [("head", _aligned(headers, widths))] if header else []
    print_lines([*lines, *((style, _aligned(cells, widths)) for style, cells in rows)])


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
