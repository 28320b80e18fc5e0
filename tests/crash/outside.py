"""The world outside of Spine: services that outlive it, and the domains and the publisher that speak to them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spine import Event
from spine.domains import Refused, RunFacts
from spine.effects import ABSENT, APPLIED, TOMBSTONED, Effect
from spine.governance.units import Write

LEDGER = "CREATE TABLE ledger (effect_id TEXT PRIMARY KEY, run_id TEXT NOT NULL)"
# The one that hangs is waited for in every case; the others have time enough on a machine that is busy.
HANGS_S = 0.1
TIMEOUT_S = 1.0

# What becomes of a run's calls, by what the run's id begins with: domain and method to the mood they meet.
MOODS: Mapping[str, Mapping[tuple[str, str], str]] = {
    "commit": {},
    "twice": {},
    "refuse": {("payment", "forward"): "refuse"},
    "break": {("payment", "forward"): "break"},
    "lose": {("payment", "forward"): "lost"},
    "hang": {("payment", "forward"): "timeout"},
    "ledger": {("ledger", "plan"): "refuse"},
    "guard": {("ledger", "plan"): "guard"},
    "park": {("payment", "forward"): "refuse", ("stock", "rollback"): "break"},
    "retry": {("payment", "forward"): "refuse", ("payment", "rollback"): "break"},
    "resolve": {("payment", "forward"): "break", ("stock", "rollback"): "break"},
}


class Services:
    """Two services and a broker that share one log: what they were sent, did, and undid.

    What is asked of them is done under the log's lock, and in the log, before it is answered: it stands, whichever of
    the processes that ask is killed, and whoever asks next finds it.
    """

    def __init__(self, path: Path) -> None:
        self._log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._read = 0
        self.lines: list[dict[str, Any]] = []
        self.live: set[str] = set()
        self.tombstones: set[str] = set()
        with self._asked():
            pass

    def close(self) -> None:
        os.close(self._log)

    def _catch_up(self) -> None:
        """Read what others have written."""
        new = os.pread(self._log, os.fstat(self._log).st_size - self._read, self._read)
        self._read += len(new)
        for line in new.splitlines():
            self._heard(json.loads(line))

    def _heard(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        match line["what"]:
            case "applied":
                self.live.add(line["effect"])
            case "undone":
                self.live.discard(line["effect"])
                self.tombstones.add(line["effect"])

    @contextmanager
    def _asked(self) -> Iterator[None]:
        fcntl.flock(self._log, fcntl.LOCK_EX)
        try:
            self._catch_up()
            yield
        finally:
            fcntl.flock(self._log, fcntl.LOCK_UN)

    def _write(self, what: str, **facts: Any) -> None:
        # A killed process takes nothing back that it has written; the loss of power is another test.
        os.write(self._log, json.dumps({"what": what, **facts}).encode() + b"\n")
        self._catch_up()

    def note(self, what: str, **facts: Any) -> None:
        with self._asked():
            self._write(what, **facts)

    def of(self, *what: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["what"] in what]

    # -- the contract of a participant

    def apply(self, effect: str) -> None:
        with self._asked():
            if effect in self.tombstones:
                raise Refused("TOMBSTONED", f"effect {effect} is undone")
            if effect not in self.live:
                self._write("applied", effect=effect)

    def undo(self, effect: str) -> None:
        with self._asked():
            if effect not in self.tombstones:
                self._write("undone", effect=effect)

    def status(self, effect: str) -> str:
        with self._asked():
            return TOMBSTONED if effect in self.tombstones else APPLIED if effect in self.live else ABSENT

    def late_duplicates(self) -> None:
        """The network delivers every forward that was ever sent once more."""
        for line in self.of("sent"):
            try:
                self.apply(line["effect"])
            except Refused:
                continue

    # -- a service's operator

    def mend(self, run_id: str) -> None:
        self.note("mended", run=run_id)

    def mended(self, run_id: str) -> bool:
        return any(line["run"] == run_id for line in self.of("mended"))


@dataclass
class World:
    """The services as one process reaches them: with what befalls a certain call."""

    services: Services
    befalls: Callable[[str], str | None] = lambda method: None

    async def call(self, domain: str, method: str, run_id: str, arrive: Callable[[], Any]) -> Any:
        """One request: whether it arrives, how often, and whether its reply comes back."""
        mood = MOODS[kind_of(run_id)].get((domain, method))
        if mood == "break" and self.services.mended(run_id):
            mood = None
        struck = self.befalls(method)
        # A request that arrives twice is answered no better: what the scenario refuses stays refused.
        if struck is not None and (struck != "duplicate" or mood is None):
            mood = struck
        match mood:
            case "refuse":
                raise Refused("NO", f"{domain} will not")
            case "break":
                raise ConnectionError(f"{domain} is away")
            case "lost":
                arrive()
                raise ConnectionError(f"the reply of {domain} is lost")
            case "timeout":
                arrive()
                await asyncio.get_running_loop().create_future()
            case "duplicate":
                arrive()
        return arrive()


def kind_of(run_id: str) -> str:
    return run_id.partition("-")[0]


@dataclass
class Stock:
    """EXTERNAL, cannot tell what became of an effect."""

    world: World
    name: str = "stock"
    after: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S
    attempts: int = 2

    def describe(self, run: RunFacts) -> dict[str, Any]:
        return {"run": run.run_id, "of": self.name}

    async def forward(self, effect: Effect) -> dict[str, Any]:
        services = self.world.services
        services.note("sent", effect=effect.id, tx=effect.tx_id, domain=self.name, run=effect.run_id)
        await self.world.call(self.name, "forward", effect.run_id, lambda: services.apply(effect.id))
        return {"id": f"{self.name}:{effect.id}"}

    async def rollback(self, effect: Effect) -> None:
        services = self.world.services
        services.note("rollback", effect=effect.id, tx=effect.tx_id)
        await self.world.call(self.name, "rollback", effect.run_id, lambda: services.undo(effect.id))


@dataclass
class Payment(Stock):
    """EXTERNAL, after the stock; tells what became of an effect."""

    name: str = "payment"
    after: tuple[str, ...] = ("stock",)
    timeout_s: float = HANGS_S
    attempts: int = 1

    async def status(self, effect: Effect) -> str:
        services = self.world.services
        found: str = await self.world.call(self.name, "status", effect.run_id, lambda: services.status(effect.id))
        return found


@dataclass
class Ledger:
    """LOCAL, a user's own: one row in the database's table. What it refuses once it takes when it is asked again."""

    world: World
    name: str = "ledger"
    after: tuple[str, ...] = ("payment",)

    def plan(self, run: RunFacts) -> Sequence[Write]:
        mood = MOODS[kind_of(run.run_id)].get((self.name, "plan"))
        services = self.world.services
        if mood == "refuse" and not any(line["run"] == run.run_id for line in services.of("refused")):
            services.note("refused", run=run.run_id)
            raise Refused("NO", "the books are closed")
        if mood == "guard":
            return [Write("UPDATE ledger SET run_id = run_id WHERE run_id = :nobody", {"nobody": "nobody"})]
        row = {"effect": run.effect_id, "run": run.run_id}
        return [Write("INSERT INTO ledger (effect_id, run_id) VALUES (:effect, :run)", row)]


@dataclass
class Mail:
    """POST: acts after the commit."""

    world: World
    name: str = "mail"
    after: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S

    async def post(self, effect: Effect) -> None:
        note = self.world.services.note
        await self.world.call(
            self.name, "post", effect.run_id, lambda: note("delivered", event=effect.id, run=effect.run_id)
        )


@dataclass
class Broker:
    """The publisher."""

    world: World

    async def publish(self, event: Event) -> None:
        note = self.world.services.note
        await self.world.call(
            "broker", "publish", event.run_id, lambda: note("delivered", event=event.event_id, run=event.run_id)
        )


def domains(world: World) -> list[object]:
    return [Stock(world), Payment(world), Ledger(world), Mail(world)]
