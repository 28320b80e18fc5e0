"""Law 10: the record cannot lie unnoticed.

Any row changed, removed, reordered or inserted is found by ``spine verify``; a chain rewritten whole, back to the last
checkpoint kept outside the database.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from spine import AuthorityDecision, OperationContext, OperationResult, Refused, RunFacts, Spine, Write
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.transactions import TransactionFailed
from spine.journal.verify import VerifyReport, verify
from tests.integration.command import inside
from tests.laws.world import file_of, rows

GENESIS = bytes(32)
PROJECTIONS = (
    "acknowledgements",
    "contracts",
    "governance",
    "idempotency",
    "incidents",
    "lessons",
    "open_decisions",
    "outbox",
    "policy_evaluations",
    "run_expectations",
    "runs",
    "steps",
    "traces",
    "transactions",
)


class Picky:
    name = "picky"
    after = ("incidents",)

    def plan(self, run: RunFacts) -> list[Write]:
        if run.run_id == "run-refused":
            raise Refused("NO", "not this one")
        return []


async def a_day(url: str) -> None:
    """Something of every kind: each projection holds a row, one decision is still open at the end."""
    spine, hold = Spine(url, domains=[Picky()]), anyio.Event()
    begun = anyio.Event()

    @spine.rule("work.*", id="limits", version="3")
    def limits(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params["n"] > 5:
            return AuthorityDecision.deny("too many", code="LIMIT")
        return AuthorityDecision.allow()

    @spine.operation("work.step", audit_fields=["n"])
    async def step(ctx: OperationContext) -> OperationResult:
        return OperationResult.fail("as asked") if ctx.params["n"] == 3 else OperationResult.ok({"n": ctx.params["n"]})

    @spine.operation("other.open", timeout_s=60)
    async def never_ends(ctx: OperationContext) -> None:
        begun.set()
        await hold.wait()

    async with spine:
        await spine.start_run("run-1", tenant_id="acme", agent_id="a7", expectations=[("audit", "report", 60)])
        for n in (1, 3, 7):
            await spine.execute("work.step", tenant_id="acme", run_id="run-1", params={"n": n}, idempotency_key=f"k{n}")
        await spine.ask(CreatePolicyEvaluation("run-1", "acme", "failed", 2))
        await spine.ask(EmitLesson("near_threshold", "acme", "event-1", {"metric": "tokens"}))
        await spine.bypass(reason="a test", actor="law 10")
        await spine.execute("work.step", tenant_id="acme", run_id="run-1", params={"n": 9})
        await spine.restore(reason="a test", actor="law 10")
        await spine.complete_run("run-1", tenant_id="acme", run_status="failed", error_code="E", error_message="no")
        with pytest.raises(TransactionFailed):
            await spine.complete_run("run-refused", tenant_id="acme", run_status="succeeded")
        await spine.degrade(reason="a test", actor="law 10")
        await spine.start_run("run-late", tenant_id="acme")
        async with anyio.create_task_group() as group:
            group.start_soon(
                lambda: spine.execute("other.open", tenant_id="acme", run_id="run-1", idempotency_key="open")
            )
            await begun.wait()
            # The record of this moment: a handler runs.
            with (
                closing(sqlite3.connect(file_of(url))) as live,
                closing(sqlite3.connect(f"{file_of(url)}.day")) as copy,
            ):
                live.backup(copy)
            hold.set()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a day that is told truly."""
    url = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('day') / 'spine.db'}"
    anyio.run(a_day, url)
    path = Path(f"{file_of(url)}.day")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("PRAGMA synchronous=OFF")
    return path


class Record:
    """A copy of the day, to be tampered with by SQLite's own shell, so to say."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.original = original
        self.path = folder / "tampered.db"
        self.url = f"sqlite+aiosqlite:///{self.path}"

    def tampered(self, change: Callable[[sqlite3.Connection], object], **options: Any) -> VerifyReport:
        shutil.copyfile(self.original, self.path)
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous=OFF")
            db.execute("BEGIN")
            change(db)
            db.execute("COMMIT")
        return verify(self.url, **options)

    def breaks(self, *statement: Any) -> list[tuple[int, str]]:
        """What verify finds after one statement, which must have changed something."""

        def change(db: sqlite3.Connection) -> None:
            assert db.execute(*statement).rowcount > 0, statement

        report = self.tampered(change)
        assert report.ok is not bool(report.breaks)
        return [(found.seq, found.kind) for found in report.breaks]


@pytest.fixture
def record(recorded: Path, tmp_path: Path) -> Record:
    return Record(recorded, tmp_path)


@pytest.fixture(scope="module")
def db(recorded: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{recorded}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row["name"] for row in db.execute(f"PRAGMA table_info({table})")]


def key(db: sqlite3.Connection, table: str) -> list[str]:
    """The primary key's columns in order."""
    parts = [(row["pk"], row["name"]) for row in db.execute(f"PRAGMA table_info({table})") if row["pk"]]
    return [name for _, name in sorted(parts)]


def other(value: Any) -> Any:
    """Something of the same type that it is not."""
    match value:
        case None:
            return "something"
        case int():
            return value + 1000
        case bytes():
            return bytes([value[0] ^ 1]) + value[1:]
        case _:
            return value + " "


def test_the_day_is_told_truly_and_has_something_of_everything(record: Record, db: sqlite3.Connection) -> None:
    """What the tests below tamper with: an intact record in which no table is empty."""
    report = record.tampered(lambda _: None)
    assert report.ok, report.breaks
    assert report.rows == db.execute("SELECT count(*) FROM journal").fetchone()[0] >= 40
    for table in PROJECTIONS:
        assert db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] > 0, table


def test_any_column_changed_in_any_kind_of_row_is_found_at_that_row(record: Record, db: sqlite3.Connection) -> None:
    """Every column of the journal, in the first row of each kind and in the last row of all."""
    by_kind = {row["kind"]: row["seq"] for row in db.execute("SELECT kind, seq FROM journal ORDER BY seq DESC")}
    last = db.execute("SELECT max(seq) FROM journal").fetchone()[0]
    assert len(by_kind) >= 12
    for seq in {*by_kind.values(), last}:
        row = db.execute("SELECT * FROM journal WHERE seq = ?", [seq]).fetchone()
        for column in columns(db, "journal"):
            if column == "seq":
                continue
            found = record.breaks(f"UPDATE journal SET {column} = ? WHERE seq = ?", [other(row[column]), seq])
            assert found, (seq, column)
            # The hash of a row is also its successor's business; everything else is told at the row itself.
            assert {at for at, _ in found} & {seq, seq + 1}, (seq, column, found)


def test_one_byte_changed_anywhere_in_any_body_is_found(record: Record, db: sqlite3.Connection) -> None:
    """A random byte of each row's body becomes another one; its own row is named."""
    chance = random.Random(10)
    for seq, body in db.execute("SELECT seq, body FROM journal ORDER BY seq"):
        at = chance.randrange(len(body))
        byte = chr(ord(body[at]) ^ (1 << chance.randrange(6)))
        changed = body[:at] + byte + body[at + 1 :]
        found = record.breaks("UPDATE journal SET body = ? WHERE seq = ?", [changed, seq])
        assert (seq, "hash") in found, (seq, at, byte, found)


def test_a_verdict_turned_round_is_found(record: Record, db: sqlite3.Connection) -> None:
    """The lie that pays: a denial becomes an allowance in the body, and in every column that copies it."""
    seq, body = db.execute("SELECT seq, body FROM journal WHERE json_extract(body, '$.code') = 'LIMIT'").fetchone()
    lie = body.replace('"allowed":false', '"allowed":true')
    assert lie != body
    assert (seq, "hash") in record.breaks("UPDATE journal SET body = ? WHERE seq = ?", [lie, seq])


def test_any_row_removed_is_found_at_its_place(record: Record, db: sqlite3.Connection) -> None:
    """Every single row of the journal, the first and the last one too."""
    last = db.execute("SELECT max(seq) FROM journal").fetchone()[0]
    for seq in range(1, last + 1):
        found = record.breaks("DELETE FROM journal WHERE seq = ?", [seq])
        assert (seq, "tail" if seq == last else "gap") in found, (seq, found)


def test_a_tail_removed_is_found_even_with_the_head_set_back(record: Record, db: sqlite3.Connection) -> None:
    """The last rows gone and the head made to fit: the projections still tell of them."""
    last = db.execute("SELECT max(seq) FROM journal").fetchone()[0]
    for gone in (1, 2, 5, 10):
        kept = last - gone
        digest = db.execute("SELECT hash FROM journal WHERE seq = ?", [kept]).fetchone()[0]

        def cut(connection: sqlite3.Connection, kept: int = kept, digest: bytes = digest) -> None:
            connection.execute("DELETE FROM journal WHERE seq > ?", [kept])
            connection.execute("UPDATE journal_head SET size = ?, hash = ?", [kept, digest])

        assert not record.tampered(cut).ok, gone


def test_all_rows_removed_is_found(record: Record) -> None:
    """An emptied journal does not pass for a new one."""
    assert record.breaks("DELETE FROM journal")


def test_rows_that_changed_places_are_found(record: Record, db: sqlite3.Connection) -> None:
    """Two neighbours, and two far apart, swapped in their numbers."""
    last = db.execute("SELECT max(seq) FROM journal").fetchone()[0]
    for one, two in ((1, 2), (7, 8), (last - 1, last), (5, last - 3), (1, last)):

        def swap(connection: sqlite3.Connection, one: int = one, two: int = two) -> None:
            connection.execute("UPDATE journal SET seq = -1 WHERE seq = ?", [one])
            connection.execute("UPDATE journal SET seq = ? WHERE seq = ?", [one, two])
            connection.execute("UPDATE journal SET seq = ? WHERE seq = -1", [two])

        report = record.tampered(swap)
        assert {found.seq for found in report.breaks} >= {one, two}, (one, two, report.breaks)


def test_a_row_inserted_is_found(record: Record, db: sqlite3.Connection) -> None:
    """Between two others, behind the last, before the first, or into a stream of its own; well made or not."""
    last = db.execute("SELECT max(seq) FROM journal").fetchone()[0]
    names = [name for name in columns(db, "journal") if name not in ("stream", "seq", "prev", "hash")]
    copied = ", ".join(names)
    insert = "INSERT INTO journal (stream, seq, prev, hash, {0}) SELECT ?, ?, {1}, {2}, {0} FROM journal WHERE seq = 5"
    for stream, seq in (("main", last + 1), ("main", 0), ("main", -7), ("main", last + 50), ("other", 1)):
        assert record.breaks(insert.format(copied, "prev", "hash"), [stream, seq]), (stream, seq)
    # A row that continues the chain as it should, but that nobody committed: the head does not know it.
    digest = db.execute("SELECT hash FROM journal WHERE seq = ?", [last]).fetchone()[0]
    body = db.execute("SELECT body FROM journal WHERE seq = 5").fetchone()[0]
    forged = hash_of(last + 1, digest, body)
    assert record.breaks(insert.format(copied, "?", "?"), ["main", last + 1, digest, forged])
    # Making room for it first moves all others.

    def squeeze(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE journal SET seq = -seq WHERE seq > 10")
        connection.execute("UPDATE journal SET seq = 1 - seq WHERE seq < 0")
        connection.execute(insert.format(copied, "prev", "hash"), ["main", 11])

    report = record.tampered(squeeze)
    assert 11 in {found.seq for found in report.breaks}


def test_a_head_that_was_changed_or_removed_is_found(record: Record, db: sqlite3.Connection) -> None:
    """The one row that says where the chain ends."""
    head = db.execute("SELECT * FROM journal_head").fetchone()
    for column in ("stream", "size", "hash"):
        assert record.breaks(f"UPDATE journal_head SET {column} = ?", [other(head[column])]), column
    assert record.breaks("UPDATE journal_head SET size = size - 1")
    assert record.breaks("DELETE FROM journal_head")


@pytest.mark.parametrize("table", PROJECTIONS)
def test_any_projection_changed_removed_or_invented_is_found_by_its_table(
    record: Record, db: sqlite3.Connection, table: str
) -> None:
    """What users query is compared with what the journal says: every column of a row, the row gone, one too many."""
    row = db.execute(f"SELECT * FROM {table} ORDER BY 1 LIMIT 1").fetchone()
    where = " AND ".join(f"{name} = ?" for name in key(db, table))
    identity = [row[name] for name in key(db, table)]
    expected = f"projection:{table}"
    for column in columns(db, table):
        found = record.breaks(f"UPDATE {table} SET {column} = ? WHERE {where}", [other(row[column]), *identity])
        assert expected in {kind for _, kind in found}, (column, found)
    found = record.breaks(f"DELETE FROM {table} WHERE {where}", identity)
    assert {kind for _, kind in found} == {expected}
    names = columns(db, table)
    invented = [other(row[name]) if name in (*key(db, table), "attempt") else row[name] for name in names]
    found = record.breaks(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", invented)
    assert {kind for _, kind in found} == {expected}


# -- a forger who knows how it works


def hash_of(seq: int, prev: bytes, body: str) -> bytes:
    """The chain's hash as the design states it, made without Spine."""
    stream = b"main"
    start = b"\x00" + b"spine.journal.v1" + len(stream).to_bytes(4, "big") + stream
    return hashlib.sha256(start + seq.to_bytes(8, "big") + prev + body.encode()).digest()


def rewrite(connection: sqlite3.Connection, change: Callable[[dict[str, Any]], None]) -> None:
    """Every body through ``change``, the whole chain hashed anew, the head made to fit."""
    prev, seq = GENESIS, 0
    for seq, old in connection.execute("SELECT seq, body FROM journal ORDER BY seq").fetchall():
        body = json.loads(old)
        change(body)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hash_of(seq, prev, text)
        connection.execute("UPDATE journal SET prev = ?, hash = ?, body = ? WHERE seq = ?", [prev, digest, text, seq])
        prev = digest
    connection.execute("UPDATE journal_head SET size = ?, hash = ?", [seq, prev])


def soften(body: dict[str, Any]) -> None:
    """A denial that was about money becomes one about manners: nothing that a projection holds."""
    if body["kind"] == "decision" and body["code"] == "LIMIT":
        body["reason"] = body["authority_reason"] = "a typing mistake"


def test_a_chain_rewritten_whole_is_found_only_by_a_checkpoint_kept_outside(
    record: Record, db: sqlite3.Connection
) -> None:
    """Rewritten by somebody who knows how, the record agrees with itself; the noted (size, hash) tells."""
    before = record.tampered(lambda _: None)
    size, digest = before.head
    changed = db.execute("SELECT seq FROM journal WHERE json_extract(body, '$.code') = 'LIMIT'").fetchone()[0]
    unnoticed = record.tampered(lambda connection: rewrite(connection, soften))
    assert unnoticed.ok, unnoticed.breaks
    assert unnoticed.head != before.head
    noticed = record.tampered(lambda connection: rewrite(connection, soften), checkpoints=[(size, digest)])
    assert [(found.seq, found.kind) for found in noticed.breaks] == [(size, "checkpoint")]
    # The place is bounded by the checkpoints around it: the one before the change still holds.
    kept = [
        (seq, db.execute("SELECT hash FROM journal WHERE seq = ?", [seq]).fetchone()[0].hex())
        for seq in (1, changed - 1, changed, size)
    ]
    noticed = record.tampered(lambda connection: rewrite(connection, soften), checkpoints=kept)
    assert [(found.seq, found.kind) for found in noticed.breaks] == [(changed, "checkpoint"), (size, "checkpoint")]


def test_rewriting_without_a_change_changes_nothing(record: Record) -> None:
    """The forger's tools are right: the same bodies give the same chain, checkpoint and all."""
    before = record.tampered(lambda _: None)
    same = record.tampered(lambda connection: rewrite(connection, lambda _: None), checkpoints=[before.head])
    assert same.ok
    assert same.head == before.head


def test_a_record_set_back_to_an_earlier_state_is_found_by_a_later_checkpoint(sqlite_url: str, tmp_path: Path) -> None:
    """A true copy of yesterday in place of today agrees with itself; what was noted today does not agree with it."""

    async def days() -> None:
        async with Spine(sqlite_url) as spine:
            await spine.start_run("run-1", tenant_id="acme")
        shutil.copyfile(file_of(sqlite_url), tmp_path / "yesterday.db")
        async with Spine(sqlite_url) as spine:
            await spine.complete_run("run-1", tenant_id="acme", run_status="failed")

    anyio.run(days)
    today = verify(sqlite_url)
    yesterday = f"sqlite+aiosqlite:///{tmp_path / 'yesterday.db'}"
    assert today.ok
    assert verify(yesterday).ok
    noticed = verify(yesterday, checkpoints=[today.head])
    assert [(found.seq, found.kind) for found in noticed.breaks] == [(today.head[0], "checkpoint")]


@pytest.mark.anyio
async def test_a_record_that_is_being_written_verifies_at_every_moment(sqlite_url: str) -> None:
    """The check sees one moment; writers go on, and the checkpoints it gave hold later."""
    spine = Spine(sqlite_url)
    checkpoints: list[tuple[int, str]] = []

    @spine.operation("work.step")
    async def step(ctx: OperationContext) -> None:
        pass

    async def load() -> None:
        while len(checkpoints) < 6:
            await spine.execute("work.step", tenant_id="acme", run_id="run-1")

    async with spine, anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(load)
        while len(checkpoints) < 6:
            report = await anyio.to_thread.run_sync(lambda: verify(sqlite_url, checkpoints=checkpoints))
            assert report.ok, report.breaks
            checkpoints.append(report.head)
    assert verify(sqlite_url, checkpoints=checkpoints).ok
    assert [size for size, _ in checkpoints] == sorted(size for size, _ in checkpoints)
    assert len(rows(sqlite_url)) > checkpoints[0][0]


@pytest.mark.anyio
async def test_why_tells_that_its_evidence_is_broken(sqlite_url: str) -> None:
    """The answer about a run looks at its own rows: one changed word and it says so."""
    spine = Spine(sqlite_url)

    @spine.operation("work.step")
    async def step(ctx: OperationContext) -> None:
        pass

    async with spine:
        await spine.execute("work.step", tenant_id="acme", run_id="run-1")
        await spine.execute("work.step", tenant_id="acme", run_id="run-2")
        await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        assert (await spine.why("run-1")).to_dict()["evidence"]["intact"]
        with closing(sqlite3.connect(file_of(sqlite_url), isolation_level=None)) as db:
            db.execute(
                "UPDATE journal SET body = replace(body, 'work.step', 'work.stop') "
                "WHERE run_id = 'run-1' AND kind = 'decision'"
            )
        assert not (await spine.why("run-1")).to_dict()["evidence"]["intact"]


@pytest.mark.anyio
async def test_why_tells_of_a_denial_that_was_hidden_by_its_copied_column(sqlite_url: str) -> None:
    """The body keeps its hash and the chain holds: only the column by which the run's rows are found was changed."""
    spine = Spine(sqlite_url)

    @spine.rule("work.*")
    def never(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("no", code="NEVER")

    @spine.operation("work.step")
    async def step(ctx: OperationContext) -> None:
        pass

    async with spine:
        await spine.start_run("run-1", tenant_id="acme")
        await spine.start_run("run-2", tenant_id="acme")
        await spine.execute("work.step", tenant_id="acme", run_id="run-1")
        await spine.execute("work.step", tenant_id="acme", run_id="run-2")
        await spine.complete_run("run-1", tenant_id="acme", run_status="failed")
        assert (await spine.why("run-1")).verdict == "denied"
        with closing(sqlite3.connect(file_of(sqlite_url), isolation_level=None)) as db:
            db.execute("UPDATE journal SET run_id = NULL WHERE run_id = 'run-1' AND kind = 'decision'")
        lied = await spine.why("run-1")
        assert (lied.verdict, lied.evidence["intact"], lied.exit_code) == ("failed", False, 7)
        assert (await spine.why("run-2")).evidence["intact"]


@pytest.mark.anyio
async def test_why_of_an_id_that_is_not_text_is_why_of_no_run(sqlite_url: str) -> None:
    """No journal can hold such an id: a program is told that there is no such run, not how text is encoded."""
    async with Spine(sqlite_url) as spine:
        for run_id in ("\ud800", "run-1\x00"):
            with pytest.raises(LookupError, match="no journal row tells of run"):
                await spine.why(run_id)


def test_the_command_says_which_row_is_broken_and_by_its_exit_code_that_one_is(record: Record) -> None:
    """``spine verify --json``: 0 and ok, or 1 and the place."""
    record.tampered(lambda _: None)
    whole = inside("verify", "--db", record.url, "--json")
    assert (whole.returncode, json.loads(whole.stdout)["ok"]) == (0, True)
    record.tampered(lambda connection: connection.execute("UPDATE journal SET body = body || ' ' WHERE seq = 9"))
    broken = inside("verify", "--db", record.url, "--json")
    assert broken.returncode == 1
    told = json.loads(broken.stdout)
    assert not told["ok"]
    assert {"stream": "main", "seq": 9, "kind": "hash"} in told["breaks"]


def test_verifying_takes_no_part_in_what_it_verifies(record: Record) -> None:
    """The file is byte for byte what it was."""
    record.tampered(lambda _: None)
    before = (record.path.read_bytes(), record.path.stat().st_mtime_ns)
    assert verify(record.url).ok
    assert (record.path.read_bytes(), record.path.stat().st_mtime_ns) == before
