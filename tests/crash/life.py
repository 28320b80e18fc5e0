"""One life of an application: it completes runs, or finds what an earlier one left, and something befalls it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio

from actors import coordinator, outbox, takeover
from spine import Spine
from spine.governance.transactions import TransactionFailed
from spine.kernel.errors import SpineError
from spine.kernel.supervisor import Policy
from spine.settings import Retry, Settings
from tests.crash.outside import MOODS, Broker, Services, World, domains

RUNS = tuple(f"{kind}-1" for kind in MOODS)
TENANT = "acme"
QUIET_S = 15.0
STORM_STRIKES = 10
ANY = ""
AT_FAILPOINTS = ("kill", "raise", "cancel")
ON_CALLS = ("timeout", "lost", "duplicate")
STORM = ("raise", "raise", "raise", "raise", "cancel", "cancel", "kill")


@dataclass(frozen=True)
class Blow:
    """What befalls a life, the ``n``-th time that it passes the failpoint, or makes the call, ``at``; or any, if empty.

    At a failpoint ``kill``, ``raise`` or ``cancel``; on a call ``timeout``, ``lost`` (its reply) or ``duplicate``.
    ``storm``: any of the former at any failpoint by chance, ``n`` is its seed. ``clock``: killed after ``n`` ms.
    """

    kind: str
    at: str = ANY
    n: int = 1


@dataclass
class Told:
    """What the callers of all lives were told, each line written before they go on."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.lines = [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def note(self, what: str, **facts: Any) -> None:
        self.lines.append({"what": what, **facts})
        os.write(self._file, json.dumps(self.lines[-1]).encode() + b"\n")

    def of(self, *what: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["what"] in what]

    def close(self) -> None:
        os.close(self._file)


class Life:
    """An application on the database ``url``; its services, and what its callers were told, lie in ``place``."""

    def __init__(self, url: str, place: Path, blow: Blow | None = None) -> None:
        self._blow = blow or Blow("none")
        self._chance = random.Random(self._blow.n)
        self._strikes = 0
        self._passed: Counter[str] = Counter()
        self._visits = os.open(place / "visits", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.services = Services(place / "services")
        self.told = Told(place / "told")
        world = World(self.services, self._befalls)
        self.spine = Spine(
            url,
            domains=domains(world),
            publisher=Broker(world),
            settings=Settings(
                retry=Retry(attempts=2, first_s=0.001, most_s=0.01),
                supervision=Policy(intensity=100),
                drain_s=2,
                stop_s=5,
                failpoint=self._pass,
            ),
        )

    async def work(self, runs: Sequence[str]) -> None:
        """Complete the runs, each by a caller of its own, at the same time; then wait until nothing is in flight."""
        async with self.spine:
            self._wind_up()
            await asyncio.gather(*[self._caller(run) for run in runs])
            await self._quiet()

    async def recover(self) -> None:
        """Wait until nothing is in flight, and ask again for what was told as committed."""
        asked = self.told.of("committed")
        async with self.spine:
            self._wind_up()
            await self._quiet()
            for line in asked:
                await self._complete(line["run"], line["key"], "again")

    # -- the callers

    async def _caller(self, run: str) -> None:
        kind = run.partition("-")[0]
        try:
            if kind == "twice":
                await self.spine.start_run(run, tenant_id=TENANT)
                await self._complete(run, "first")
                await self._complete(run, "second")
                return
            parked = await self._complete(run)
            if parked is None:
                return
            if kind == "retry":
                self.services.mend(run)
                await self.spine.retry(parked, reason="mended", actor="op")
                self.told.note("retried", run=run, tx=parked)
            elif kind == "resolve":
                for line in self.services.of("sent"):
                    if line["tx"] == parked:
                        self.services.undo(line["effect"])
                await self.spine.resolve(parked, evidence="ticket 1", reason="by hand", actor="op")
                self.told.note("resolved", run=run, tx=parked)
        except SpineError as error:
            self.told.note("error", run=run, error=repr(error))

    async def _complete(self, run: str, key: str = "", committed: str = "committed") -> str | None:
        """Complete the run and note what was told; gives the transaction if it is parked."""
        try:
            result = await self.spine.complete_run(run, tenant_id=TENANT, run_status="succeeded", completion_key=key)
        except TransactionFailed as error:
            what = {"ROLLED_BACK": "rolled back", "PARKED": "parked"}.get(error.phase.value, "failed")
            facts = {"phase": error.phase.value, "code": error.code, "steps": _steps(error.partial_results)}
            self.told.note(what, run=run, key=key, tx=error.transaction_id, **facts)
            return error.transaction_id if what == "parked" else None
        facts = {"phase": result.phase.value, "events": result.events_published, "steps": _steps(result.to_dict())}
        self.told.note(committed, run=run, key=key, tx=result.transaction_id, **facts)
        return None

    async def _quiet(self) -> None:
        """Return once no transaction is in flight and no event waits; in this order, for the one makes the other."""
        reader = self.spine._system.reader
        with anyio.fail_after(QUIET_S):
            while True:
                states = await reader.unended()
                if not states.keys() - {"PARKED"} and not await reader.pending_events(1):
                    return
                await anyio.sleep(0.01)

    # -- what befalls it

    def _wind_up(self) -> None:
        if self._blow.kind == "clock":
            timer = threading.Timer(self._blow.n / 1000, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    async def _pass(self, name: str) -> None:
        os.write(self._visits, name.encode() + b"\n")
        self._passed.update((name, ANY))
        blow = self._blow
        if blow.kind == "storm":
            if self._strikes < STORM_STRIKES and self._chance.random() < 0.04:
                self._strikes += 1
                await self._strike(self._chance.choice(STORM))
        elif blow.kind in AT_FAILPOINTS and blow.at in (name, ANY) and self._passed[blow.at] == blow.n:
            await self._strike(blow.kind)

    async def _strike(self, kind: str) -> None:
        self.told.note("struck", kind=kind)
        match kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("a failpoint raises")
            case "cancel":
                # Its coordinator ends, and with it every task that it owns: this one stands here until then.
                for task in asyncio.all_tasks():
                    if task.get_name().startswith("spine.coordinator."):
                        task.cancel()
                await asyncio.get_running_loop().create_future()

    def _befalls(self, method: str) -> str | None:
        call = f"call.{method}"
        self._passed[call] += 1
        if (call, self._passed[call]) != (self._blow.at, self._blow.n):
            return None
        self.told.note("struck", kind=self._blow.kind)
        return self._blow.kind


def _steps(result: dict[str, Any]) -> dict[str, str]:
    return {entry["domain"]: entry["state"] for entry in result.get("domains", ())}


def preload() -> None:
    """Import and cache what a life needs by living once, beside everything; nothing stays open, no thread is left."""
    with suppress(ImportError):
        import psycopg  # noqa: F401
    with TemporaryDirectory() as folder:
        asyncio.run(Life(f"sqlite+aiosqlite:///{folder}/spine.db", Path(folder)).recover())
    assert threading.active_count() == 1, threading.enumerate()


def hurry() -> None:
    """Look for what is left more often than an application needs to."""
    takeover.TICK_S = 0.05
    outbox.RELOAD_S = 0.1
    outbox.PUBLISH_S = 1.0
    coordinator.STOP_S = 0.05


def live(spec: dict[str, Any]) -> None:
    """Live once, as ``spec`` says."""
    blow = Blow(**spec["blow"]) if spec["blow"] is not None else None
    life = Life(spec["url"], Path(spec["place"]), blow)
    asyncio.run(life.work(spec["runs"]) if spec["runs"] else life.recover())
