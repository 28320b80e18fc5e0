"""The protocol of run completion as an explicit-state model, derived from the transition table.

Two effects, two coordinators, a network that loses, repeats and reorders, crashes anywhere. Every move of the
transaction and of its steps is looked up in the table by its name, so a changed table is a changed model. Participants
keep what a domain promises. What must hold of it, and how it is run: ``protocol_model``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import NamedTuple, TypeVar

from spine.governance.transactions import STEP_MOVES, TX_MOVES, StepMove, StepState, TxMove, TxState
from tests.properties.explorer import Move

EFFECTS = 2
LAST = EFFECTS - 1

# States travel as plain strings: an enum member is hashed by a Python call, and a search hashes millions.
T = {state.name: state.value for state in TxState}
S = {state.name: state.value for state in StepState}
# What is no more to be undone.
SETTLED = {S["PLANNED"], S["ROLLED_BACK"]}
Item = TypeVar("Item")


class Table:
    """The transition table, asked by the name of a move."""

    def __init__(self, tx_moves: Sequence[TxMove] = TX_MOVES, step_moves: Sequence[StepMove] = STEP_MOVES) -> None:
        self._tx = {
            m.name: (m.source.value, m.target.value, {s.value for s in m.every}, {s.value for s in m.some})
            for m in tx_moves
        }
        self._step = {
            (m.name, m.within.value, source.value): m.target.value for m in step_moves for source in m.sources
        }
        # Where steps move a coordinator drives; elsewhere there is nothing to claim.
        self.driven = {m.within.value for m in step_moves}

    def tx(self, name: str, tx: str, steps: tuple[str, ...]) -> str | None:
        """Where the transaction is after the move; None where the table does not allow it."""
        source, target, every, some = self._tx[name]
        allowed = tx == source and (not every or every.issuperset(steps)) and (not some or not some.isdisjoint(steps))
        return target if allowed else None

    def step(self, name: str, tx: str, step: str) -> str | None:
        """Where the step is after the move; None where the table does not allow it."""
        return self._step.get((name, tx, step))


class Far:
    """What lies beyond the database, of one effect, as bits: the participant, and the calls under way to it.

    An answer is no message of its own but whatever the participant has said: it may be heard late, twice, never, or
    by another coordinator than the one that asked.
    """

    LIVE = 1
    SAID_YES = 2
    SAID_NO = 4
    UNDONE = 8  # a rollback was carried out and left its tombstone
    FORWARD = 16
    ROLLBACK = 32


class Doing:
    """Where a coordinator is in its work."""

    READY = "ready"
    FORWARD = "to send forward"
    FORWARDED = "awaits forward"
    ROLLBACK = "to send rollback"
    ROLLED = "awaits rollback"
    ABORT = "to abort"  # in a mutant only


class Rows(NamedTuple):
    """What is durable."""

    tx: str
    epoch: int
    steps: tuple[str, ...]
    outbox: bool = False


class Coordinator(NamedTuple):
    """A coordinator at work; one that has crashed or given up is not there.

    It decides from ``seen``: the rows as it took the transaction over, and its own writes since. ``step``
    is the one it is at; where it is ready, the one from which it has still to go back if it compensates.
    """

    seen: Rows
    doing: str = Doing.READY
    step: int = LAST


class State(NamedTuple):
    """Everything; coordinators in the order of their epochs, so that which of the two is which makes no new state."""

    rows: Rows
    published: bool
    far: tuple[int, ...]
    coordinators: tuple[Coordinator, ...]


class Flaw(Enum):
    """One thing a mutant does otherwise."""

    NO_TOMBSTONE = auto()
    SEND_BEFORE_INTENT = auto()
    ROLLBACK_BEFORE_ABORT = auto()
    PUBLISH_EARLY = auto()
    NO_FENCING = auto()


Moves = Iterator[Move[State]]
OVERTAKEN = "finds its write refused"


class Protocol:
    """The successor function.

    ``epochs`` bounds it: begin takes the first, each claim and each retry of the operator another. ``coordinators`` is
    how many may be at work at once: the owner, and others that do not know yet that they were overtaken. ``chained``
    makes the second effect stand on the first, which is then not undone before it.
    """

    def __init__(
        self,
        epochs: int,
        coordinators: int = 2,
        *,
        chained: bool = False,
        table: Table | None = None,
        flaw: Flaw | None = None,
    ) -> None:
        self.epochs = epochs
        self.coordinators = coordinators
        self.chained = chained
        self.table = table or Table()
        self.flaw = flaw

    def initial(self) -> State:
        """Begun, and nothing sent."""
        rows = Rows(T["EXECUTING"], 1, (S["PLANNED"],) * EFFECTS)
        return State(rows, False, (0,) * EFFECTS, (Coordinator(rows),))

    def moves(self, state: State) -> Moves:
        """Whatever may happen next."""
        yield from self._network(state)
        yield from self._publisher_and_operator(state)
        yield from self._takeover(state)
        for me in state.coordinators:
            yield _go(state, me, "crash", None)
            yield from self._coordinator(state, me)

    def _network(self, s: State) -> Moves:
        """A call is delivered, and stays to be delivered again, or is lost."""
        for i, far in enumerate(s.far):
            if far & Far.FORWARD:
                if far & Far.UNDONE and self.flaw is not Flaw.NO_TOMBSTONE:
                    yield _reach(s, i, "forward meets the tombstone", far | Far.SAID_NO)
                elif not far & Far.LIVE:
                    yield _reach(s, i, "forward is applied", far | Far.LIVE | Far.SAID_YES)
                    yield _reach(s, i, "forward is refused", far | Far.SAID_NO)
                yield _reach(s, i, "forward is lost", far & ~Far.FORWARD)
            if far & Far.ROLLBACK:
                yield _reach(s, i, "rollback is applied", far & ~Far.LIVE | Far.UNDONE)
                yield _reach(s, i, "rollback is lost", far & ~Far.ROLLBACK)

    def _publisher_and_operator(self, s: State) -> Moves:
        """A retry raises the epoch and leaves the transaction to whoever claims it."""
        rows, steps = s.rows, s.rows.steps
        if rows.outbox and not s.published:
            yield Move(0, "publish", s._replace(published=True))
        if to := self.table.tx("resolve", rows.tx, steps):
            yield Move(0, "resolve", s._replace(rows=rows._replace(tx=to)))
        if rows.epoch < self.epochs and (to := self.table.tx("retry", rows.tx, steps)):
            yield Move(0, "retry", s._replace(rows=rows._replace(tx=to, epoch=rows.epoch + 1)))

    def _takeover(self, s: State) -> Moves:
        """A coordinator without work raises the epoch, reads the rows and is the owner."""
        rows = s.rows
        if rows.tx in self.table.driven and rows.epoch < self.epochs and len(s.coordinators) < self.coordinators:
            rows = rows._replace(epoch=rows.epoch + 1)
            seats = (*s.coordinators, Coordinator(rows))
            yield Move(0, f"claim as epoch {rows.epoch}", State(rows, s.published, s.far, seats))

    def _coordinator(self, s: State, me: Coordinator) -> Moves:
        i = me.step
        match me.doing:
            case Doing.READY if me.seen.tx == T["EXECUTING"]:
                yield from self._execute(s, me)
            case Doing.READY if me.seen.tx == T["COMPENSATING"]:
                yield from self._compensate(s, me)
            case Doing.FORWARD:
                yield _send(s, me, "forward", i, Doing.FORWARDED)
            case Doing.FORWARDED if self.flaw is Flaw.SEND_BEFORE_INTENT and me.seen.steps[i] == S["PLANNED"]:
                yield from self._step(s, me, "intend", i, Doing.FORWARDED, i)
            case Doing.FORWARDED:
                if s.far[i] & Far.SAID_YES:
                    yield from self._step(s, me, "done", i)
                if s.far[i] & Far.SAID_NO:
                    yield from self._step(s, me, "refused", i)
                yield from self._step(s, me, "unknown", i)
                yield _go(s, me, "tries again", Doing.FORWARD, i)
            case Doing.ROLLBACK:
                yield _send(s, me, "rollback", i, Doing.ROLLED)
            case Doing.ROLLED:
                if s.far[i] & Far.UNDONE:
                    yield from self._step(s, me, "undone", i, at=i - 1)
                yield from self._step(s, me, "park", i, at=i - 1)
                yield _go(s, me, "tries again", Doing.ROLLBACK, i)
            case Doing.ABORT:
                yield from self._tx(s, me, "abort")

    def _execute(self, s: State, me: Coordinator) -> Moves:
        """The steps in order; an abort at any time, for a local domain or a cancellation may want it too."""
        yield from self._tx(s, me, "commit")
        yield from self._tx(s, me, "abort")
        steps = me.seen.steps
        i = next((n for n, step in enumerate(steps) if step != S["DONE"]), None)
        if i is None:
            if self.flaw is Flaw.PUBLISH_EARLY:
                yield Move(me.seen.epoch, "publish", s._replace(published=True))
        elif self.flaw is Flaw.SEND_BEFORE_INTENT and steps[i] == S["PLANNED"]:
            yield _go(s, me, "turns to", Doing.FORWARD, i)
        else:
            yield from self._step(s, me, "intend", i, Doing.FORWARD, i)
            if steps[i] == S["INTENT"]:  # an owner before this one may have sent it
                yield from self._step(s, me, "unknown", i)
                yield _go(s, me, "turns to", Doing.FORWARD, i)
        if self.flaw is Flaw.ROLLBACK_BEFORE_ABORT:
            for n, step in enumerate(steps):
                if step != S["PLANNED"]:
                    yield _send(s, me, "rollback", n, Doing.ABORT)

    def _compensate(self, s: State, me: Coordinator) -> Moves:
        """The steps once in reverse, those that an owner before parked too; what a parked one stands on is left."""
        steps = me.seen.steps
        for i in range(me.step, -1, -1):
            if self.chained and not SETTLED.issuperset(steps[i + 1 :]):
                continue
            if steps[i] == S["RB_INTENT"]:
                yield _go(s, me, "turns to", Doing.ROLLBACK, i)
                return
            if undo := self._step(s, me, "undo", i, Doing.ROLLBACK, i):
                yield from undo
                return
        yield from self._tx(s, me, "compensated") or self._tx(s, me, "park")

    def _step(
        self, s: State, me: Coordinator, name: str, i: int, doing: str = Doing.READY, at: int = LAST
    ) -> list[Move[State]]:
        """A step's durable move, if the table has it for what the coordinator has seen."""
        to = self.table.step(name, me.seen.tx, me.seen.steps[i])
        if to is None:
            return []
        if s.rows.steps[i] != me.seen.steps[i] or not self._stored(s, me):
            return [_go(s, me, OVERTAKEN, None)]
        return [_write(s, me, f"{name} {i}", lambda rows: rows._replace(steps=_put(rows.steps, i, to)), doing, at)]

    def _tx(self, s: State, me: Coordinator, name: str) -> list[Move[State]]:
        """The transaction's durable move, likewise; the one that commits fills the outbox."""
        to = self.table.tx(name, me.seen.tx, me.seen.steps)
        if to is None:
            return []
        if not self._stored(s, me):
            return [_go(s, me, OVERTAKEN, None)]
        doing = Doing.READY if to in self.table.driven else None
        return [_write(s, me, name, lambda rows: rows._replace(tx=to, outbox=name == "commit"), doing)]

    def _stored(self, s: State, me: Coordinator) -> bool:
        """Whether the compare-and-set finds the transaction as the coordinator knows it."""
        fenced = self.flaw is not Flaw.NO_FENCING
        return s.rows.tx == me.seen.tx and not (fenced and s.rows.epoch != me.seen.epoch)


def _put(items: tuple[Item, ...], n: int, item: Item) -> tuple[Item, ...]:
    return (*items[:n], item, *items[n + 1 :])


def _seats(s: State, me: Coordinator, now: Coordinator | None) -> tuple[Coordinator, ...]:
    n = s.coordinators.index(me)
    return (*s.coordinators[:n], *(() if now is None else (now,)), *s.coordinators[n + 1 :])


def _reach(s: State, i: int, what: str, far: int) -> Move[State]:
    return Move(0, f"{what} {i}", State(s.rows, s.published, _put(s.far, i, far), s.coordinators))


def _go(s: State, me: Coordinator, what: str, doing: str | None, i: int = 0) -> Move[State]:
    now, label = (None, what) if doing is None else (Coordinator(me.seen, doing, i), f"{what} {i}")
    return Move(me.seen.epoch, label, State(s.rows, s.published, s.far, _seats(s, me, now)))


def _send(s: State, me: Coordinator, what: str, i: int, doing: str) -> Move[State]:
    far = _put(s.far, i, s.far[i] | (Far.FORWARD if what == "forward" else Far.ROLLBACK))
    seats = _seats(s, me, Coordinator(me.seen, doing, i))
    return Move(me.seen.epoch, f"send {what} {i}", State(s.rows, s.published, far, seats))


def _write(
    s: State, me: Coordinator, what: str, change: Callable[[Rows], Rows], doing: str | None, at: int = LAST
) -> Move[State]:
    rows = change(s.rows)
    seen = rows if s.rows == me.seen else change(me.seen)
    now = None if doing is None else Coordinator(seen, doing, at)
    return Move(me.seen.epoch, what, State(rows, s.published, s.far, _seats(s, me, now)))
