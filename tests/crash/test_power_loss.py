"""Power loss: whatever was told as durable is in the journal afterwards, and each unit wholly or not at all.

A run is cut after every single change of a file. At each cut several disks are looked at: what was not synced is gone,
is all there, or is there in part (see ``power``). SPINE_TEST_POWER_LOSS=N looks at N partial disks at each cut instead
of one, and at all cuts of the negative controls:
``SPINE_TEST_POWER_LOSS=40 pytest tests/crash/test_power_loss.py``.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest

from spine import AuthorityDecision, Event, OperationContext, RunFacts, Settings, Spine, Write
from spine.governance.units import Committed, GuardFailed, Unit
from spine.journal.engine import parse_url
from spine.journal.verify import verify
from spine.journal.writer import GroupCommit
from spine.kernel.clock import VirtualClock
from spine.kernel.errors import JournalError
from tests.crash.power import (
    EVERYTHING,
    NOTHING,
    SOMETHING,
    Created,
    DirectorySynced,
    Disk,
    Step,
    Synced,
    Told,
    Truncated,
    Wrote,
    recorded,
)
from tests.governed import SQLITE, intact, journal, path_of, query, running, until
from tests.unit.journal_kit import completion, day, started, writing

SEEDS = int(os.environ.get("SPINE_TEST_POWER_LOSS", "0"))
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(0 if SEEDS else 120)]
BILLS = "CREATE TABLE bills (run_id TEXT PRIMARY KEY)"
BILL = "INSERT INTO bills (run_id) VALUES (:run)"
ROWS = "SELECT seq, hash, unit, kind, run_id FROM journal ORDER BY seq"


@dataclass(frozen=True, slots=True)
class Found:
    """What a database holds: the journal's rows, a domain's own, and a digest of all of it."""

    rows: Sequence[tuple[int, bytes, str, str, str | None]] = ()
    bills: frozenset[str] = frozenset()
    digest: bytes = b""


def look(path: Path) -> Found:
    """Open a database as SQLite itself recovers it; one without tables is as good as none."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous=OFF")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return Found()
        rows = db.execute(ROWS).fetchall()
        bills = db.execute("SELECT run_id FROM bills").fetchall() if "bills" in tables else []
        return Found(rows, frozenset(run for (run,) in bills), sha256(db.serialize()).digest())


def lay(files: dict[str, bytes], path: Path) -> None:
    """Put a disk's files where ``path`` is, and nothing else."""
    for old in path.parent.iterdir():
        old.unlink()
    for name, content in files.items():
        path.with_name(name).write_bytes(content)


class Aftermath:
    """Judges what a power loss left of a run, knowing what the same run wrote in the end."""

    def __init__(self, whole: Found, folder: Path) -> None:
        self._whole = whole
        self._path = folder / "spine.db"
        self._url = f"{SQLITE}{self._path}"
        self._disks: dict[int, tuple[int, str]] = {}
        self._contents: dict[bytes, str] = {}
        folder.mkdir(exist_ok=True)

    @property
    def contents(self) -> int:
        """How many different contents of the database were seen."""
        return len(self._contents)

    def judge(self, files: dict[str, bytes]) -> tuple[int, str]:
        """How many rows of the journal are left, and what is broken, if anything is."""
        # Most cuts leave what another one left: each disk is opened once; each content, and now and then a disk of
        # known content, is verified and written on.
        disk = hash(tuple(sorted(files.items())))
        if disk not in self._disks:
            self._disks[disk] = self._judge(files)
        return self._disks[disk]

    def _judge(self, files: dict[str, bytes]) -> tuple[int, str]:
        lay(files, self._path)
        try:
            found = look(self._path)
        except sqlite3.Error as error:
            return 0, str(error)
        size = len(found.rows)
        if found.digest not in self._contents:
            self._contents[found.digest] = self._half(found) or self._unusable(files, size)
        elif len(self._disks) % 100 == 0:
            return size, self._contents[found.digest] or self._unusable(files, size)
        return size, self._contents[found.digest]

    def _half(self, found: Found) -> str:
        size, rows = len(found.rows), self._whole.rows
        if list(found.rows) != list(rows[:size]):
            return "the rows are not those that were written"
        if 0 < size < len(rows) and rows[size - 1][2] == rows[size][2]:
            return f"half of unit {rows[size][2]}"
        billed = {run for *_, kind, run in found.rows if kind == "tx.committed"} & self._whole.bills
        return "" if billed == found.bills else f"bills without their unit, or the reverse: {found.bills ^ billed}"

    def _unusable(self, files: dict[str, bytes], size: int) -> str:
        """The files as the power loss left them must verify, and a new writer must be able to go on."""
        lay(files, self._path)
        try:
            if size and not (report := verify(self._url)).ok:
                return str(report.breaks)
            writer = GroupCommit(parse_url(self._url), busy_timeout_ms=1_000, checkpoint_pages=2_000)
            writer.open()
            outcomes = writer.commit([Unit("afterwards", [started("afterwards")])])
            writer.close()
            report = verify(self._url)
        except (JournalError, sqlite3.Error) as error:
            return str(error)
        return "" if report.ok and outcomes == [Committed(size + 1, size + 1)] else f"{outcomes}, {report.breaks}"


def problems(log: Sequence[Step], aftermath: Aftermath, *, every: int = 1, partly: int = 1) -> list[str]:
    """What is wrong after a cut behind every so many steps of ``log``; ``Told`` names the last row relied on."""
    disk, promised, found = Disk(), 0, []
    for cut, step in enumerate(log):
        disk.take(step)
        if isinstance(step, Told):
            promised = max(promised, step.what)
        if cut % every:
            continue
        fates = [SOMETHING[(cut // every + seed) % len(SOMETHING)] for seed in range(partly)]
        for seed, fate in enumerate([NOTHING, EVERYTHING, *fates]):
            size, broken = aftermath.judge(disk.after_power_loss(fate, Random(f"{cut} {seed}")))
            if broken:
                found.append(f"broken at step {cut}, {fate}: {broken}")
            elif size < promised:
                found.append(f"lost at step {cut}, {fate}: {promised} rows were told, {size} are there")
    return found


# -- the journal's writer


def billed(tx: str, run: str) -> Unit:
    return completion(tx, run, writes=[Write(BILL, {"run": run})])


def batches() -> list[list[Unit]]:
    """A day of group commits of one to four units; in some of them a unit is refused and the rest written singly."""
    units = [billed(unit.id[5:], f"run-{unit.id[8:]}") if unit.id.startswith("unit-tx") else unit for unit in day(8)]
    made, sizes = [], Random(4)
    while units:
        size = sizes.randint(1, 4)
        batch, units = units[:size], units[size:]
        if len(made) % 7 == 6:
            batch.insert(0, Unit(f"refused-{len(made)}", [started("run-0")]))
        made.append(batch)
    return made


async def write_day(url: str, synchronous: str = "FULL") -> list[Step]:
    """The log of a writer that starts on nothing and is stopped, and of another one that goes on.

    They copy the log back now and then, the second as soon as it can, so that it is restarted; it is cut when long.
    """
    left = batches()
    first = 2 * len(left) // 3
    with recorded(synchronous=synchronous) as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr("spine.journal.engine._WAL_LIMIT_BYTES", 100_000)
        for some, pages in ((left[:first], 60), (left[first:], 2)):
            async with writing(url, checkpoint_pages=pages, idle_s=600) as writer:
                if pages == 60:
                    with closing(sqlite3.connect(path_of(url))) as db:
                        db.execute(BILLS)
                for batch in some:
                    outcomes = await writer.commit(batch)
                    kept = [outcome.last for outcome in outcomes if isinstance(outcome, Committed)]
                    assert len(kept) + sum(isinstance(outcome, GuardFailed) for outcome in outcomes) == len(batch)
                    log.append(Told(max(kept)))
    return log


async def test_no_acknowledged_unit_is_lost_and_none_is_half_there(sqlite_url: str, tmp_path: Path) -> None:
    """Some twenty group commits, checkpoints, restarts of the log, a stop and a second start, cut at every step."""
    log = await write_day(sqlite_url)
    aftermath = Aftermath(look(path_of(sqlite_url)), tmp_path / "after")
    assert problems(log, aftermath, partly=SEEDS or 1) == []
    # It went through what it is about. The main file is the first; a log's header is written when it is begun anew.
    assert log.count(Synced(0)) > 10, "no checkpoints"
    assert sum(isinstance(step, Created) for step in log) < sum(wrote_header(step) for step in log), "no restarts"
    assert any(isinstance(step, Truncated) and step.file for step in log), "no log was cut"
    assert aftermath.contents > sum(isinstance(step, Told) for step in log)


def wrote_header(step: Step) -> bool:
    return isinstance(step, Wrote) and (step.offset, len(step.data)) == (0, 32)


@pytest.mark.parametrize(
    ("synchronous", "ignored", "word"),
    [("NORMAL", None, "lost"), ("OFF", None, "broken"), ("FULL", DirectorySynced, "lost")],
)
async def test_the_same_eyes_see_what_weaker_syncing_loses(
    sqlite_url: str, tmp_path: Path, synchronous: str, ignored: type[Step] | None, word: str
) -> None:
    """The negative control: acknowledged units are lost with less than FULL, or when names are never made durable.

    In NORMAL nothing but the last commits may be lost; without any syncing the file does not even hold together.
    """
    log = [step for step in await write_day(sqlite_url, synchronous) if not (ignored and isinstance(step, ignored))]
    aftermath = Aftermath(look(path_of(sqlite_url)), tmp_path / "after")
    seen = {problem.split()[0] for problem in problems(log, aftermath, every=1 if SEEDS else 23)}
    assert word in seen
    if synchronous == "NORMAL":
        assert seen == {"lost"}


async def test_the_power_goes_again_and_again(tmp_path: Path) -> None:
    """Each life starts on the disk that the loss before it left, and is cut anywhere, in its recovery too."""
    url, chance = f"{SQLITE}{tmp_path}/lives/spine.db", Random(7)
    path, kept, files = path_of(url), 0, dict[str, bytes]()
    path.parent.mkdir()
    for life in range(30 * (SEEDS or 1)):
        lay(files, path)
        with recorded(holds=sorted(files)) as log:
            async with writing(url, checkpoint_pages=chance.choice([2, 30]), idle_s=600) as writer:
                for batch in range(chance.randint(1, 6)):
                    units = [Unit(f"{life}-{batch}-{n}", [started(f"{life}-{batch}-{n}")]) for n in range(3)]
                    outcomes = await writer.commit(units)
                    assert isinstance(outcomes[-1], Committed)
                    log.append(Told(outcomes[-1].last))
        whole = look(path)
        cut, fate, disk = chance.randrange(len(log)), chance.choice([NOTHING, EVERYTHING, *SOMETHING]), Disk(files)
        for step in log[:cut]:
            disk.take(step)
        files = disk.after_power_loss(fate, chance)
        told = [step.what for step in log[:cut] if isinstance(step, Told)]
        size, broken = Aftermath(whole, tmp_path / "after").judge(files)
        assert not broken, (life, cut, fate)
        assert size >= max([kept, *told]), (life, cut, fate)
        kept = size
    assert kept > 100


# -- a whole Spine


class Billing:
    name, after = "billing", ()

    def plan(self, run: RunFacts) -> Sequence[Write]:
        return [Write(BILL, {"run": run.run_id})]


class Telling:
    """A publisher whose receivers rely on the event's commit."""

    def __init__(self, log: list[Step]) -> None:
        self._log = log

    async def publish(self, event: Event) -> None:
        self._log.append(Told(("tx.committed", event.run_id)))


def made(url: str, log: list[Step]) -> Spine:
    spine = Spine(url, domains=[Billing()], publisher=Telling(log))

    @spine.rule("mill.forbidden")
    def never(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("not here", code="NEVER")

    @spine.operation("mill.forbidden")
    @spine.operation("mill.grind")
    @spine.operation("mill.buffered", durability="buffered")
    async def grind(ctx: OperationContext) -> dict[str, Any]:
        if ctx.operation == "mill.grind":
            log.append(Told(("decision", ctx.run_id)))
        return {"ground": ctx.run_id}

    return spine


async def govern(url: str) -> list[Step]:
    """The log of a Spine's working day; its ``Told`` are of results, effects, events and switches, as row numbers."""
    with recorded() as log:
        spine = made(url, log)
        async with running(spine):
            with closing(sqlite3.connect(path_of(url))) as db:
                db.execute(BILLS)
            for n in range(2):
                run = f"run-{n}"
                assert (await spine.start_run(run, tenant_id="acme")).allowed
                log.append(Told(("run.started", run)))
                for operation in ("grind", "forbidden"):
                    call = f"{operation}-{n}"
                    result = await spine.execute(f"mill.{operation}", tenant_id="acme", run_id=call)
                    assert result.durable
                    log.append(Told(("outcome" if result.success else "decision", call)))
                result = await spine.execute("mill.buffered", tenant_id="acme", run_id=run)
                assert not result.durable
                await spine.flush()
                log.append(Told(("outcome", run)))
                assert (await spine.complete_run(run, tenant_id="acme", run_status="succeeded")).is_complete
                log.append(Told(("tx.committed", run)))
            await spine.halt(reason="an exercise", actor="ann")
            log.append(Told(("governance.changed", "halted")))
    rows = {(body["kind"], body.get("run_id") or body.get("to")): body["seq"] for body in journal(url)}
    return [Told(rows[step.what]) if isinstance(step, Told) else step for step in log]


async def test_what_a_running_spine_told_is_in_the_journal_after_the_cut(sqlite_url: str, tmp_path: Path) -> None:
    """Durable results, the decisions of effects, published events, switches; and another Spine goes on from there."""
    log = await govern(sqlite_url)
    aftermath = Aftermath(look(path_of(sqlite_url)), tmp_path / "after")
    assert problems(log, aftermath, partly=SEEDS or 1) == []
    path = tmp_path / "next" / "spine.db"
    path.parent.mkdir()
    url, later, disk, resumed = f"{SQLITE}{path}", VirtualClock(time.time_ns() // 1000 + 60_000_000), Disk(), 0
    for step in log:
        disk.take(step)
        if not isinstance(step, Told):
            continue
        lay(disk.after_power_loss(NOTHING, Random(0)), path)
        if unanswered(url):
            resumed += 1
            # The machine that lost its power is another one now, not this process.
            query(url, "UPDATE instances SET process = 'elsewhere/1/1'")
            async with running(Spine(url, settings=Settings(clock=later))):
                await until(lambda: not unanswered(url))
            intact(url)
    assert resumed >= 2, "no handler was interrupted"


def unanswered(url: str) -> set[str]:
    """The decisions that a dead process left open."""
    let = {body["decision_id"] for body in journal(url, "decision") if not body["final"]}
    return let - {body["decision_id"] for body in journal(url, "outcome")}
