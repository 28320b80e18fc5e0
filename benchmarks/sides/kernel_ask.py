"""A kernel ask: caller, spine mailbox, supervised actor, reply; deadline, ring and counters are on, as always."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from benchmarks.side import arguments, async_rate, report
from spine.kernel.actor import Actor
from spine.kernel.clock import SystemClock
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Lane, Request
from spine.kernel.router import Router
from spine.kernel.supervisor import ChildSpec, Supervisor
from spine.kernel.tracing import Tracer


@dataclass(slots=True)
class Echo(Request[int]):
    """Answered with its number."""

    n: int


class EchoActor(Actor):
    """Answers at once."""

    name = "echo"

    def receive(self, envelope: Any) -> None:
        envelope.reply(envelope.payload.n)


async def measure(seconds: float) -> dict[str, float]:
    """The latency of one caller and the throughput of 100."""
    clock = SystemClock()
    exchange = Exchange(clock, Tracer("0" * 16))
    exchange.mailbox("echo")
    children = [ChildSpec("router", lambda: Router(exchange)), ChildSpec("echo", lambda: EchoActor(exchange))]
    supervisor = Supervisor(exchange, Ids(clock), children)
    await supervisor.start()

    async def call(number: int) -> None:
        await exchange.ask(Echo(number), "echo", timeout_s=30, lane=Lane.INGRESS)

    await async_rate(call, 100, seconds / 5)
    alone = await async_rate(call, 1, seconds)
    many = await async_rate(call, 100, seconds)
    if not exchange.ledger.counts().balanced:
        raise RuntimeError(f"admitted is not ended plus in flight: {exchange.ledger.counts()}")
    await supervisor.stop(5)
    return {"ask_alone_us": 1e6 / alone, "ask_100": many}


def main() -> None:
    options = arguments()
    report(asyncio.run(measure(options.seconds)))


if __name__ == "__main__":
    main()
