"""A kernel of its own for a test: an exchange, its router and actors that do what a message tells them, no journal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from spine.kernel.actor import Actor
from spine.kernel.clock import Clock, SystemClock
from spine.kernel.errors import ActorCrashed, NotRunning
from spine.kernel.exchange import ROUTER, Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope, Lane, Request
from spine.kernel.router import Router
from spine.kernel.supervisor import ChildSpec, Policy, Receipt, Supervisor
from spine.kernel.tracing import Level, Tracer


@dataclass(slots=True)
class Say(Request[str]):
    """Asks an actor to end this message in a given way: reply, twice, fail, crash or silence."""

    how: str = "reply"
    text: str = "done"
    run_id: str | None = None


class Worker(Actor):
    """Does as ``Say`` says, at once; keeps what it was given."""

    name = "worker"
    fail_start: BaseException | None = None

    def __init__(self, exchange: Exchange, log: list[str]) -> None:
        super().__init__(exchange)
        self.log = log
        self.handled: list[str] = []

    async def start(self) -> None:
        self.log.append(f"{self.name} starts")
        if self.fail_start is not None:
            raise self.fail_start

    async def stop(self) -> None:
        self.log.append(f"{self.name} stops")

    def receive(self, envelope: Envelope) -> None:
        say: Say = envelope.payload
        self.handled.append(say.text)
        match say.how:
            case "reply":
                envelope.reply(say.text)
            case "twice":
                envelope.reply(say.text)
                envelope.reply("again")
            case "fail":
                envelope.fail(ValueError(say.text))
            case "crash":
                raise RuntimeError(say.text)
            case "return":
                self.exchange.signal(self.name, Leave(), timeout_s=5, sender="itself")
            case "silence" | "tell":
                pass
            case _:
                raise AssertionError(say.how)


class Leave:
    """Nothing an actor knows: the loop crashes on it as on any message that it does not understand."""


def actor(name: str, kind: type[Worker] = Worker, **facts: Any) -> type[Worker]:
    """A kind of worker under its own name."""
    return type(kind.__name__, (kind,), {"name": name, **facts})


@dataclass(slots=True)
class Kernel:
    exchange: Exchange
    supervisor: Supervisor
    log: list[str]
    made: list[Actor] = field(default_factory=list)

    def ask(self, how: str = "reply", text: str = "done", *, to: str = "worker", **options: Any) -> asyncio.Task[str]:
        options.setdefault("timeout_s", 5)
        return asyncio.ensure_future(self.exchange.ask(Say(how, text), to, **options))

    def newest(self, name: str = "worker") -> Worker:
        return next(made for made in reversed(self.made) if made.name == name)  # type: ignore[return-value]

    async def restarted(self, times: int, name: str = "worker") -> None:
        await until(lambda: self.supervisor.restarted >= times and self.supervisor.states()[name] == "ready")


_made: list[Exchange] = []


def exchange(*, credits: int = 4096, clock: Clock | None = None, level: Level = "off") -> Exchange:
    """An exchange alone; ``close_exchanges`` at the end."""
    _made.append(Exchange(clock or SystemClock(), Tracer("b007" * 4, level), credits=credits))
    return _made[-1]


def close_exchanges() -> None:
    """Close the streams of every exchange of this test."""
    while _made:
        for mailbox in _made.pop().mailboxes.values():
            mailbox.close()


@asynccontextmanager
async def kernel(
    *kinds: type[Worker],
    credits: int = 64,
    clock: Clock | None = None,
    policy: Policy | None = None,
    level: Level = "off",
    specs: Callable[[str, Callable[[], Actor]], ChildSpec] = ChildSpec,
) -> AsyncIterator[Kernel]:
    """Actors behind a router, started in this order; stopped at the end if the test has not."""
    clock = clock or SystemClock()
    own = exchange(credits=credits, clock=clock, level=level)
    built = Kernel(own, None, [])  # type: ignore[arg-type]

    def start(kind: type[Worker]) -> Callable[[], Actor]:
        def make() -> Actor:
            built.made.append(kind(own, built.log))
            return built.made[-1]

        return make

    children = [ChildSpec(ROUTER, lambda: Router(own)), *(specs(kind.name, start(kind)) for kind in kinds or (Worker,))]
    built.supervisor = Supervisor(own, Ids(clock, 1), children, policy or Policy())
    # pytest-timeout cannot interrupt an event loop: what hangs ends here.
    with anyio.fail_after(20):
        try:
            await built.supervisor.start()
            yield built
        finally:
            await stop(built)


async def stop(built: Kernel, deadline_s: float = 5.0) -> list[Receipt]:
    """What ``Spine.stop`` does with a kernel."""
    if built.exchange.closed is None:
        built.exchange.close(NotRunning("stopping"))
    receipts = await built.supervisor.stop(deadline_s)
    for mailbox in built.exchange.mailboxes.values():
        built.exchange.bury(mailbox)
    for envelope in list(built.exchange.ledger.open.values()):
        envelope.fail(NotRunning("stopped"))
    return receipts


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return once the condition holds; fail when it does not within ``seconds``."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.001)


async def ends(asks: Sequence[asyncio.Future[Any]]) -> list[str]:
    """How each ask ended: its reply, or the name of its error."""
    results = await asyncio.gather(*asks, return_exceptions=True)
    return [type(result).__name__ if isinstance(result, BaseException) else result for result in results]


def envelope(
    number: int = 1, lane: Lane = Lane.INTERNAL, *, sender: str = "caller", payload: object = None
) -> Envelope:
    """An envelope outside any exchange, for what only carries it."""
    return Envelope(None, number, payload, "worker", sender, lane, 1e9, 0.0, None, "", 0, False)  # type: ignore[arg-type]


__all__ = [
    "ActorCrashed",
    "Kernel",
    "Leave",
    "Say",
    "Worker",
    "actor",
    "close_exchanges",
    "ends",
    "envelope",
    "exchange",
    "kernel",
    "until",
]
