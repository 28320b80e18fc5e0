"""Domains outside for tests: systems that keep what is done to them by effect id, and misbehave as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from spine import Refused, RunFacts, Settings, Spine, TransactionFailed, TransactionResult, Write
from spine.effects import Effect
from spine.settings import Retry
from tests.governed import Published, journal, query

QUICKLY = Retry(attempts=3, first_s=0.001, most_s=0.002)

# The domains that take part in every completion.
BUILT_IN = ("incidents", "policies", "traces")

# How a system behaves when it is asked; ``do`` does what it was asked for and gives the answer.
Do = Callable[[], Any]
Behaviour = Callable[[Do], Awaitable[Any]]


async def well(do: Do) -> Any:
    """Do it and say so."""
    return do()


async def hang(do: Do) -> Any:
    """Never answer, and do nothing."""
    await asyncio.Event().wait()


def raises(error: BaseException | type[BaseException]) -> Behaviour:
    """Fail before anything happened."""

    async def behave(do: Do) -> Any:
        raise error

    return behave


def refuses(code: str = "NO_FUNDS", reason: str = "the account is empty") -> Behaviour:
    return raises(Refused(code, reason))


def loses(behaviour: Behaviour) -> Behaviour:
    """Do it, and then behave as if it had not been done."""

    async def behave(do: Do) -> Any:
        do()
        return await behaviour(do)

    return behave


def returns(value: Any) -> Behaviour:
    """Do it and answer this."""

    async def behave(do: Do) -> Any:
        do()
        return value

    return behave


def then(*behaviours: Behaviour) -> Behaviour:
    """One after the other, the last one for ever."""
    left = list(behaviours)

    async def behave(do: Do) -> Any:
        return await (left.pop(0) if len(left) > 1 else left[0])(do)

    return behave


class Held:
    """A behaviour that does it, tells that it was reached, and answers only when it is let go."""

    def __init__(self, behaviour: Behaviour = well) -> None:
        self.behaviour = behaviour
        self.reached = asyncio.Event()
        self.let_go = asyncio.Event()

    async def __call__(self, do: Do) -> Any:
        value = await self.behaviour(do)
        self.reached.set()
        await self.let_go.wait()
        return value


@dataclass(frozen=True)
class Called:
    """One call that reached a system."""

    domain: str
    what: str
    effect: Effect

    def __str__(self) -> str:
        return f"{self.what} {self.domain}"


@dataclass
class World:
    """All systems outside together: every call in its order, and what of them stands, by effect id."""

    calls: list[Called] = field(default_factory=list)
    live: dict[str, str] = field(default_factory=dict)
    tombs: set[str] = field(default_factory=set)
    epochs: dict[str, int] = field(default_factory=dict)

    def told(self, *whats: str) -> list[str]:
        """The calls in their order; all of them, unless some are named."""
        return [str(call) for call in self.calls if not whats or call.what in whats]

    def effects(self, what: str, domain: str) -> list[Effect]:
        """What the domain was given with each of these calls."""
        return [call.effect for call in self.calls if (call.what, call.domain) == (what, domain)]

    def standing(self) -> list[str]:
        """The domains whose effects stand, sorted."""
        return sorted(self.live.values())

    def called(self, domain: str, what: str, effect: Effect) -> None:
        self.calls.append(Called(domain, what, effect))
        self.epochs[effect.tx_id] = max(effect.epoch, self.epochs.get(effect.tx_id, 0))


class Remote:
    """An EXTERNAL domain that keeps its contract: idempotent by effect id, tombstones, fenced by epoch."""

    def __init__(
        self,
        world: World,
        name: str = "pay",
        *,
        after: Sequence[str] = (),
        forward: Behaviour = well,
        rollback: Behaviour = well,
        timeout_s: float = 10.0,
        attempts: int = 3,
        **more: Any,
    ) -> None:
        self.world, self.name, self.after = world, name, tuple(after)
        self.forwards, self.rollbacks = forward, rollback
        self.timeout_s, self.attempts = timeout_s, attempts
        # ``describe``, ``action``, ``refuse_when_parked``
        self.__dict__.update(more)

    async def forward(self, effect: Effect) -> Any:
        self.world.called(self.name, "forward", effect)
        return await self.forwards(lambda: self._apply(effect))

    async def rollback(self, effect: Effect) -> None:
        self.world.called(self.name, "rollback", effect)
        await self.rollbacks(lambda: self._undo(effect))

    def _apply(self, effect: Effect) -> Mapping[str, Any]:
        if effect.id in self.world.tombs:
            raise Refused("TOMBSTONED", f"effect {effect.id} was undone")
        if effect.epoch < self.world.epochs[effect.tx_id]:
            raise Refused("FENCED", f"epoch {effect.epoch} is over")
        self.world.live[effect.id] = self.name
        return {"id": f"{self.name}-{effect.id}"}

    def _undo(self, effect: Effect) -> None:
        self.world.tombs.add(effect.id)
        self.world.live.pop(effect.id, None)


class Probed(Remote):
    """One that also tells what became of an effect."""

    async def status(self, effect: Effect) -> str:
        self.world.called(self.name, "status", effect)
        if effect.id in self.world.tombs:
            return "tombstoned"
        return "applied" if effect.id in self.world.live else "absent"


class Irreversible:
    """An EXTERNAL domain that cannot be undone."""

    name, after = "mail", ()

    def __init__(self, world: World) -> None:
        self.world = world

    async def forward(self, effect: Effect) -> None:
        self.world.called(self.name, "forward", effect)


class Sender:
    """A POST domain."""

    def __init__(
        self,
        world: World,
        name: str = "mail",
        *,
        after: Sequence[str] = (),
        post: Behaviour = well,
        timeout_s: float = 10.0,
        **more: Any,
    ) -> None:
        self.world, self.name, self.after = world, name, tuple(after)
        self.posts, self.timeout_s = post, timeout_s
        self.__dict__.update(more)

    async def post(self, effect: Effect) -> None:
        self.world.called(self.name, "post", effect)
        await self.posts(lambda: self.world.live.update({effect.id: self.name}))


class Local:
    """A LOCAL domain whose plan is what the test says: the writes, an error, or a function of the run."""

    def __init__(self, plan: Any, name: str = "book", *, after: Sequence[str] = ()) -> None:
        self.name, self.after = name, tuple(after)
        self.does = plan
        self.seen: list[RunFacts] = []

    def plan(self, run: RunFacts) -> Sequence[Write]:
        self.seen.append(run)
        if isinstance(self.does, BaseException):
            raise self.does
        found: Sequence[Write] = self.does(run) if callable(self.does) else self.does
        return found


class Pause:
    """A failpoint at which a Spine stands still, once, until it is let go."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self.reached, self.let_go = asyncio.Event(), asyncio.Event()

    async def __call__(self, moment: str) -> None:
        if moment == self.moment and not self.reached.is_set():
            self.reached.set()
            await self.let_go.wait()


def over(url: str, *domains: Any, publisher: Any = None, **settings: Any) -> Spine:
    """A Spine that tries again without waiting long."""
    return Spine(
        url, domains=domains, publisher=publisher or Published(), settings=Settings(**{"retry": QUICKLY, **settings})
    )


def coordinator(spine: Spine) -> Any:
    """The coordinator that runs now."""
    return spine._system.supervisor._children["coordinator"].actor  # type: ignore[union-attr]


async def complete(spine: Spine, run_id: str = "run-1", status: str = "succeeded", **call: Any) -> TransactionResult:
    return await spine.complete_run(run_id, **{"tenant_id": "acme", "run_status": status, **call})


async def failure(spine: Spine, run_id: str = "run-1", **call: Any) -> TransactionFailed:
    """The error that the completion ends with."""
    with pytest.raises(TransactionFailed) as raised:
        await complete(spine, run_id, **call)
    return raised.value


def transactions(url: str, run_id: str = "run-1") -> list[str]:
    """The states of the run's attempts in their order."""
    found = query(url, "SELECT state FROM transactions WHERE run_id = ? ORDER BY seq_begun", run_id)
    return [state for (state,) in found]


def steps(url: str, tx_id: str | None = None) -> dict[str, str]:
    """Where each step outside stands, by domain; of the last attempt of all, unless one is named."""
    found = query(
        url,
        "SELECT s.tx_id, s.domain, s.state FROM steps s JOIN transactions t ON t.tx_id = s.tx_id "
        "WHERE s.class = 'EXTERNAL' ORDER BY t.seq_begun, s.n",
    )
    last = tx_id or (found[-1][0] if found else None)
    return {domain: state for tx, domain, state in found if tx == last}


def acks(url: str, *domains: str) -> list[tuple[str, str]]:
    """What the domains acknowledged, in order: (domain, status)."""
    return [
        (body["domain"], body["status"])
        for body in journal(url, "ack")
        if body.get("tx_id") and (not domains or body["domain"] in domains)
    ]


def moves(url: str, run_id: str = "run-1") -> list[str]:
    """The transaction's journal as words: its own moves, and those of its steps outside."""
    found = []
    for body in journal(url):
        if body.get("run_id") != run_id or not body["kind"].startswith("tx."):
            continue
        if body["kind"] != "tx.step":
            found.append(body["kind"].removeprefix("tx."))
        elif body["class"] == "EXTERNAL":
            found.append(f"{body['move']} {body['domain']}")
    return found
