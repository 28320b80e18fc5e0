"""Explicit-state search: every state a model can reach, breadth first, so that a counterexample is a shortest one."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Move(NamedTuple, Generic[S]):
    """One small step: ``by`` is the epoch of the coordinator that took it, 0 where none did."""

    by: int
    what: str
    after: S

    def __str__(self) -> str:
        return f"epoch {self.by}: {self.what}" if self.by else self.what


class Model(Protocol[S]):
    """What can be searched."""

    def initial(self) -> S: ...
    def moves(self, state: S) -> Iterable[Move[S]]: ...


Invariants = Mapping[str, Callable[[S], bool]]
"""What must hold of every state."""
Laws = Mapping[str, Callable[[S, Move[S]], bool]]
"""What must hold of every move from the state before it."""


@dataclass
class Search(Generic[S]):
    """What a search found: all states, or those before the first ``broken`` invariant or law."""

    model: Model[S]
    states: list[S] = field(default_factory=list)
    parents: array[int] = field(default_factory=lambda: array("l"))
    # The successors of state n are edges[starts[n]:starts[n + 1]].
    edges: array[int] = field(default_factory=lambda: array("l"))
    starts: array[int] = field(default_factory=lambda: array("l"))
    taken: set[str] = field(default_factory=set)
    broken: str | None = None
    trace: list[str] = field(default_factory=list)

    def without(self, goal: Callable[[S], bool]) -> Iterator[S]:
        """The states from which no sequence of moves leads to a ``goal``; of a search that broke nothing."""
        leads = bytearray(map(goal, self.states))
        edges, starts, more = self.edges, self.starts, True
        while more:
            more = False
            for n in reversed(range(len(leads))):
                if not leads[n] and any(leads[after] for after in edges[starts[n] : starts[n + 1]]):
                    leads[n] = more = True
        return (state for state, does in zip(self.states, leads, strict=True) if not does)

    def path(self, n: int) -> list[str]:
        """The moves that led to state ``n``."""
        found: list[str] = []
        while self.parents[n] >= 0:
            before, after = self.states[self.parents[n]], self.states[n]
            found.append(str(next(move for move in self.model.moves(before) if move.after == after)))
            n = self.parents[n]
        return found[::-1]


def search(model: Model[S], invariants: Invariants[S], laws: Laws[S]) -> Search[S]:
    """Search ``model`` until something breaks or nothing is left."""
    found = Search(model)
    collects = gc.isenabled()
    # A search makes no cycles, and looking for some among its million tuples takes half its time.
    gc.disable()
    try:
        _search(found, invariants, laws)
    finally:
        if collects:
            gc.enable()
    return found


def _search(found: Search[S], invariants: Invariants[S], laws: Laws[S]) -> None:
    states, edges, moves = found.states, found.edges, found.model.moves
    states.append(found.model.initial())
    found.parents.append(-1)
    index = {states[0]: 0}
    # The list grows while it is read.
    for n, before in enumerate(states):
        found.starts.append(len(edges))
        for move in moves(before):
            after = move.after
            found.taken.add(move.what)
            broken = [name for name, holds in laws.items() if not holds(before, move)]
            place = index.get(after)
            if place is None:
                place = index[after] = len(states)
                states.append(after)
                found.parents.append(n)
                broken += [name for name, holds in invariants.items() if not holds(after)]
            if broken:
                found.broken, found.trace = broken[0], [*found.path(n), str(move)]
                return
            edges.append(place)
    found.starts.append(len(edges))
