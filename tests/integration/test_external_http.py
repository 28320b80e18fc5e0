"""The project's own EXTERNAL domain, against a real service over HTTP that loses replies, dawdles and is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

import spine
from spine import Effect, Retry, RunFacts, Settings, Spine, TransactionFailed, TransactionPhase
from spine.testing import ContractViolated, check_domain
from tests.governed import intact, journal, running, together, until

EXAMPLES = Path(next(iter(spine.__path__))).parent / "examples"
CLOSED = "globex"

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not (EXAMPLES / "payments.py").exists(), reason="only a source tree has the examples"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"spine_example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Service:
    """The payment service as a process that can be killed and started again where it was."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "payments.db"
        self.url = ""
        self.process: subprocess.Popen[str] | None = None
        self.options: tuple[str, ...] = ()

    def start(self, *options: str) -> str:
        self.options = options or self.options
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, str(EXAMPLES / "payments_service.py"), "--db", str(self.file), "--port", port]
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the service did not start"
        return self.url

    def kill(self) -> None:
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def ask(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """What its file says, past the service."""
        with closing(sqlite3.connect(self.file, timeout=10)) as db:
            return db.execute(sql, params).fetchall()

    def charges(self) -> dict[str, tuple[str, int | None]]:
        return {key: (state, cents) for key, state, cents in self.ask("SELECT id, state, cents FROM charges")}

    async def live(self, effect: Effect) -> int:
        ((count,),) = self.ask("SELECT COUNT(*) FROM charges WHERE id = ? AND state = 'applied'", effect.id)
        return count


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    own = Service(tmp_path)
    yield own
    own.kill()


@pytest.fixture
def payments() -> type:
    return load("payments").Payments


async def test_the_example_keeps_the_participant_contract_while_replies_get_lost(service: Service, payments: type):
    """Every clause is checked, none is left out, and nothing stays charged."""
    url = service.start("--lose-every", "3", "--closed", CLOSED)
    report = await check_domain(
        payments(url),
        live=service.live,
        refused=RunFacts("run-refused", CLOSED, "succeeded", "", 0),
        restarted=lambda: payments(url),
    )
    assert report.unchecked == ()
    assert len(report.passed) == 22
    assert {state for state, _ in service.charges().values()} == {"tombstoned"}


async def test_the_kit_tells_when_the_service_is_not_there(service: Service, payments: type):
    url = service.start()
    service.kill()
    with pytest.raises(ContractViolated, match=r"answers: .*\n.*ConnectionRefusedError"):
        await check_domain(payments(url))


async def complete(spine: Spine, run_id: str, tenant_id: str) -> str:
    try:
        return (await spine.complete_run(run_id, tenant_id=tenant_id, run_status="succeeded")).phase.value
    except TransactionFailed as failed:
        return failed.phase.value


def matches(url: str, service: Service) -> Counter[str]:
    """How many transactions ended in which way; what the service holds must be what the journal says."""
    rows = journal(url, "tx.step", "tx.committed", "tx.aborted", "tx.parked")
    ended = {row["tx_id"]: row["kind"] for row in rows if row["kind"] != "tx.step"}
    steps = {row["effect_id"]: row for row in rows if row["kind"] == "tx.step" and row["class"] == "EXTERNAL"}
    described = {row["effect_id"]: row["descriptor"] for row in rows if row.get("descriptor")}
    held = service.charges()
    for effect_id, step in steps.items():
        charged = described[effect_id]["cents"]
        expected = (
            ("applied", charged) if ended[step["tx_id"]] == "tx.committed" else ("tombstoned", held[effect_id][1])
        )
        assert held[effect_id] == expected, (effect_id, step["run_id"], ended[step["tx_id"]])
    assert held.keys() == steps.keys()
    return Counter(ended.values())


async def test_runs_end_whole_while_the_service_loses_replies_and_is_killed(
    service: Service, payments: type, sqlite_url: str
):
    """Every run is charged or not at all, and the service's books say what the journal says."""
    url = service.start("--lose-every", "3", "--closed", CLOSED)
    settings = Settings(retry=Retry(attempts=40, first_s=0.05, most_s=0.5))
    phases: dict[str, str] = {}

    class Watched(payments):
        refused: ClassVar[list[str]] = []

        def _send(self, method: str, *rest: Any) -> Any:
            try:
                return super()._send(method, *rest)
            except ConnectionRefusedError:
                self.refused.append(method)
                raise

    domain = Watched(url)
    spine = Spine(sqlite_url, domains=[domain], settings=settings)

    async def worker(number: int) -> None:
        for run in range(12):
            run_id = f"run-{number}-{run}"
            tenant_id = CLOSED if run % 5 == 4 else "acme"
            phases[run_id] = await complete(spine, run_id, tenant_id)

    async def killer() -> None:
        for after in (8, 24, 40):
            await until(lambda after=after: len(phases) >= after)
            service.kill()
            met = len(domain.refused)
            await until(lambda met=met: len(domain.refused) > met + 1)
            service.start()

    async with running(spine):
        await together(*[lambda number=number: worker(number) for number in range(5)], killer)

    counts = matches(sqlite_url, service)
    assert len(phases) == 60
    assert set(phases.values()) <= {"EVENTS_PUBLISHED", "COMMITTED", "ROLLED_BACK"}
    assert counts["tx.committed"] == sum(phase != "ROLLED_BACK" for phase in phases.values()) >= 20
    assert counts["tx.aborted"] >= 10
    assert counts["tx.parked"] == 0
    intact(sqlite_url)


async def test_a_charge_that_arrives_after_its_run_was_rolled_back_is_not_made(
    service: Service, payments: type, sqlite_url: str
):
    """The call timed out, the run was rolled back, and only then the slow service came to the charge."""
    url = service.start("--delay-s", "0.6")
    domain = payments(url)
    domain.timeout_s, domain.attempts = 0.2, 1
    spine = Spine(sqlite_url, domains=[domain])
    async with running(spine):
        with pytest.raises(TransactionFailed) as failed:
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
    assert failed.value.phase is TransactionPhase.ROLLED_BACK
    assert failed.value.code in ("TIMEOUT", "TimeoutError")
    await until(lambda: service.ask("SELECT late FROM charges") == [(1,)])
    assert matches(sqlite_url, service) == {"tx.aborted": 1}


async def test_a_service_that_stays_away_parks_what_it_cannot_take_back_and_a_retry_ends_it(
    service: Service, payments: type, sqlite_url: str
):
    """Whether a charge stands is not known, so nothing is given up: it waits, visibly, and is undone when told to."""
    url = service.start()
    domain = payments(url)
    spine = Spine(sqlite_url, domains=[domain], settings=Settings(retry=Retry(attempts=2, first_s=0.01)))
    service.kill()
    async with running(spine):
        with pytest.raises(TransactionFailed) as failed:
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        assert failed.value.phase is TransactionPhase.PARKED
        service.start()
        await spine.retry(failed.value.transaction_id, reason="the service is back", actor="jo")
        await until(lambda: journal(sqlite_url, "tx.aborted"))
    assert {state for state, _ in service.charges().values()} == {"tombstoned"}


def test_the_example_program_runs(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "payments.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = [line for line in done.stdout.splitlines() if line.startswith("run-")]
    assert [line.split(" charged as ")[0] for line in told] == [
        "run-1 EVENTS_PUBLISHED",
        "run-2 ROLLED_BACK ACCOUNT_CLOSED",
        "run-3 EVENTS_PUBLISHED",
    ]
    assert "payments (EXTERNAL) ROLLED_BACK: account globex is closed" in done.stdout
