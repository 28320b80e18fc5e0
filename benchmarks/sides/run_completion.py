"""A run's completion: incident, policy evaluation and trace, acknowledgements, the event, and its publication."""

from __future__ import annotations

import asyncio
from itertools import count

from benchmarks.databases import database
from benchmarks.side import arguments, async_rate, report
from spine import Spine
from spine.governance.transactions import TransactionPhase
from spine.publisher import Event

CALLERS = 100
TENANT, AGENT = "acme", "bench"
SPARE = 3
"""Runs started for a rate, for each that the rate of new runs lets expect: it must not run out of them."""


class InProcess:
    """Takes every event and counts it."""

    def __init__(self) -> None:
        self.taken = 0

    async def publish(self, event: Event) -> None:  # noqa: ARG002  what arrives does not matter here
        self.taken += 1


class Runs:
    """Makes run ids, starts runs, and completes each once."""

    def __init__(self, spine: Spine) -> None:
        self._spine = spine
        self._numbers = count()
        self._started: list[str] = []
        self.completed = 0

    async def start(self, number: int) -> None:
        """Start ``number`` runs, as many at a time as there are callers."""

        async def starter(amount: int) -> None:
            for _ in range(amount):
                run_id = f"run-{next(self._numbers)}"
                decision = await self._spine.start_run(run_id, tenant_id=TENANT, agent_id=AGENT)
                if not decision.allowed:
                    raise RuntimeError(f"{run_id} was not started: {decision.reason}")
                self._started.append(run_id)

        await asyncio.gather(*(starter(number // CALLERS + 1) for _ in range(CALLERS)))

    async def complete_new(self, _: int) -> None:
        """Complete a run that nobody started."""
        await self._complete(f"run-{next(self._numbers)}")

    async def complete_started(self, _: int) -> None:
        """Complete a run that was started before."""
        if not self._started:
            raise RuntimeError("more completions than runs were started for: raise SPARE")
        await self._complete(self._started.pop())

    async def _complete(self, run_id: str) -> None:
        done = await self._spine.complete_run(run_id, tenant_id=TENANT, run_status="succeeded", agent_id=AGENT)
        if done.phase is not TransactionPhase.EVENTS_PUBLISHED:
            raise RuntimeError(f"{run_id} ended {done.phase}, its event not published; its figure would be a lie")
        self.completed += 1


async def measure(url: str, seconds: float) -> dict[str, float]:
    """Completions per second alone and with 100 callers, of runs never started and of runs started before."""
    publisher = InProcess()
    figures: dict[str, float] = {}
    async with Spine(url, publisher=publisher) as spine:
        runs = Runs(spine)

        await async_rate(runs.complete_new, CALLERS, seconds / 5)
        for callers in (1, CALLERS):
            new = figures[f"start_and_complete_{callers}"] = await async_rate(runs.complete_new, callers, seconds)
            await runs.start(round(SPARE * new * seconds) + callers)
            figures[f"complete_{callers}"] = await async_rate(runs.complete_started, callers, seconds)
    if publisher.taken != runs.completed:
        raise RuntimeError(f"{runs.completed} completions, but {publisher.taken} events published")
    return figures


def main() -> None:
    options = arguments("--database")
    with database(options.database, options.dir) as url:
        report(asyncio.run(measure(url, options.seconds)))


if __name__ == "__main__":
    main()
