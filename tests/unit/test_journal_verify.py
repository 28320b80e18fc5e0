"""The record cannot lie unnoticed: every kind of tampering is found and its place named."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, Text

from spine.governance.units import Unit
from spine.journal.chain import GENESIS, MAIN_PREFIX, row_hash
from spine.journal.chain_check import COLUMNS
from spine.journal.tables import PROJECTIONS
from spine.journal.verify import Break, VerifyReport, verify
from spine.kernel.errors import JournalError, JournalUnavailable, SchemaMismatch
from tests.unit.journal_kit import all_committed, day, decided, ended, sql, started, write

pytestmark = pytest.mark.timeout(60)

ROWS = 3 * (1 + 1 + 1 + 1 + 5) + 4


@pytest.fixture
def journal(journal_url: str) -> str:
    assert all_committed(asyncio.run(write(journal_url, day())))
    return journal_url


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal whose file the hypothesis tests copy and damage."""
    path = tmp_path_factory.mktemp("original") / "spine.db"
    assert all_committed(asyncio.run(write(f"sqlite:///{path}", day())))
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a damaged copy goes; each example writes over the one before."""
    return tmp_path_factory.mktemp("scratch") / "spine.db"


def kinds(report: VerifyReport, seq: int | None = None) -> set[str]:
    return {found.kind for found in report.breaks if seq is None or found.seq == seq}


def damaged(original: Path, scratch: Path, *statements: tuple[str, tuple[Any, ...]]) -> VerifyReport:
    for leftover in scratch.parent.iterdir():
        leftover.unlink()
    shutil.copy(original, scratch)
    with closing(sqlite3.connect(scratch, isolation_level=None)) as file:
        for statement, params in statements:
            file.execute(statement, params)
    return verify(f"sqlite:///{scratch}")


def test_an_untouched_journal_is_whole(journal: str) -> None:
    report = verify(journal)
    assert (report.ok, report.rows, report.breaks) == (True, ROWS, [])
    assert report.head == (ROWS, bytes(sql(journal, "SELECT hash FROM journal_head")[0][0]).hex())
    assert report.to_dict() == {"ok": True, "rows": ROWS, "breaks": []}


def test_an_empty_journal_is_whole(journal_url: str) -> None:
    asyncio.run(write(journal_url, []))
    assert verify(journal_url, [(0, GENESIS.hex())]) == VerifyReport(True, 0, [], (0, GENESIS.hex()))


def test_the_json_form_names_stream_place_and_kind(journal: str) -> None:
    sql(journal, "UPDATE journal SET unit = 'x' WHERE seq = 4")
    assert verify(journal).to_dict()["breaks"] == [{"stream": "main", "seq": 4, "kind": "column:unit"}]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seq=st.integers(1, ROWS), column=st.sampled_from(["prev", "hash", "body"]), data=st.data())
def test_any_byte_of_any_row_is_found_at_its_place(
    original: Path, scratch: Path, seq: int, column: str, data: st.DataObject
) -> None:
    with closing(sqlite3.connect(original)) as file:
        (stored,) = file.execute(f"SELECT CAST({column} AS BLOB) FROM journal WHERE seq = ?", (seq,)).fetchone()
    at, flip = data.draw(st.integers(0, len(stored) - 1)), data.draw(st.integers(1, 255))
    changed = stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :]
    cast = "CAST(? AS TEXT)" if column == "body" else "?"
    report = damaged(original, scratch, (f"UPDATE journal SET {column} = {cast} WHERE seq = ?", (changed, seq)))
    assert not report.ok
    assert kinds(report, seq) & {"hash", "prev"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seq=st.integers(1, ROWS), column=st.sampled_from(COLUMNS), value=st.one_of(st.none(), st.text(), st.binary()))
@example(seq=2, column="ref", value=b"d-0")
def test_any_copied_column_is_found_at_its_place(
    original: Path, scratch: Path, seq: int, column: str, value: str | bytes | None
) -> None:
    with closing(sqlite3.connect(original)) as file:
        (stored,) = file.execute(f"SELECT {column} FROM journal WHERE seq = ?", (seq,)).fetchone()
    if value == stored or (value is None and column in {"kind", "unit"}):
        return
    if isinstance(value, str) and ("\x00" in value or any("\ud800" <= char <= "\udfff" for char in value)):
        value = "other"
    report = damaged(original, scratch, (f"UPDATE journal SET {column} = ? WHERE seq = ?", (value, seq)))
    assert report.breaks == [Break("main", seq, f"column:{column}")]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(1, ROWS), more=st.integers(0, 5))
@example(first=ROWS, more=0)
@example(first=1, more=0)
def test_deleted_rows_are_found_where_they_were(original: Path, scratch: Path, first: int, more: int) -> None:
    last = min(first + more, ROWS)
    report = damaged(original, scratch, ("DELETE FROM journal WHERE seq BETWEEN ? AND ?", (first, last)))
    assert Break("main", first, "gap" if last < ROWS else "tail") in report.breaks


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(1, ROWS), min_size=2, max_size=2, unique=True))
def test_two_rows_exchanged_are_found_at_both_places(original: Path, scratch: Path, places: list[int]) -> None:
    a, b = places
    move = "UPDATE journal SET seq = ? WHERE seq = ?"
    report = damaged(original, scratch, (move, (-1, a)), (move, (a, b)), (move, (b, -1)))
    assert "order" in kinds(report, a)
    assert "order" in kinds(report, b)


def test_an_inserted_row_is_found(journal: str) -> None:
    copy = "SELECT stream, seq + ?, prev, hash, body, kind, unit, run_id, tenant_id, ref FROM journal WHERE seq = ?"
    columns = "stream, seq, prev, hash, body, kind, unit, run_id, tenant_id, ref"
    sql(journal, f"INSERT INTO journal ({columns}) {copy}", 1, ROWS)
    assert {"order", "head"} <= kinds(verify(journal))


def test_a_row_of_another_stream_is_found(journal: str) -> None:
    columns = "seq, prev, hash, body, kind, unit, run_id, tenant_id, ref"
    sql(journal, f"INSERT INTO journal (stream, {columns}) SELECT 'other', {columns} FROM journal WHERE seq = 3")
    sql(journal, "INSERT INTO journal_head (stream, size, hash) SELECT 'third', size, hash FROM journal_head")
    assert verify(journal).breaks == [Break("other", 3, "head"), Break("third", 0, "head")]


def test_a_row_moved_to_another_stream_leaves_a_gap(journal: str) -> None:
    sql(journal, "UPDATE journal SET stream = 'other' WHERE seq = 3")
    found = verify(journal).breaks
    assert Break("main", 3, "gap") in found
    assert Break("other", 3, "head") in found


@pytest.mark.parametrize("value", ["3", "'three'", "2.5", "X'03'"])
def test_a_number_of_another_type_is_found(original: Path, scratch: Path, value: str) -> None:
    report = damaged(original, scratch, (f"UPDATE OR IGNORE journal SET seq = {value} WHERE seq = 4", ()))
    assert report.ok == (value == "3")


@pytest.mark.parametrize(
    ("statement", "seq", "kind"),
    [
        ("UPDATE journal_head SET size = size + 1", ROWS + 1, "tail"),
        ("UPDATE journal_head SET size = size - 1", ROWS, "head"),
        ("UPDATE journal_head SET hash = (SELECT hash FROM journal WHERE seq = 1)", ROWS, "head"),
        ("DELETE FROM journal_head", ROWS, "head"),
    ],
)
def test_a_changed_head_is_found(journal: str, statement: str, seq: int, kind: str) -> None:
    sql(journal, statement)
    assert verify(journal).breaks == [Break("main", seq, kind)]


def test_a_cut_end_with_its_head_set_back_shows_in_what_followed_from_it(journal: str) -> None:
    sql(journal, "DELETE FROM journal WHERE seq = ?", ROWS)
    last = "(SELECT hash FROM journal WHERE seq = ?)"
    sql(journal, f"UPDATE journal_head SET size = ?, hash = {last}", ROWS - 1, ROWS - 1)
    assert verify(journal).breaks == [Break("main", 0, "projection:governance")]


FILLED = [table for table in PROJECTIONS if table.name != "traces"]


def test_an_edit_of_any_column_of_any_projection_is_found_and_named(journal: str) -> None:
    for table in FILLED:
        keys = [column.name for column in table.primary_key.columns]
        others = {
            column.name: {"BIGINT": 77, "BOOLEAN": True}.get(str(column.type), "x")
            for column in table.columns
            if column.name not in keys
        }
        names = ", ".join(others)
        first = sql(journal, f"SELECT {', '.join(keys)} FROM {table.name} ORDER BY {', '.join(keys)} LIMIT 1")[0]
        place = " AND ".join(f"{key} = ?" for key in keys)
        (before,) = sql(journal, f"SELECT {names} FROM {table.name} WHERE {place}", *first)
        change = f"UPDATE {table.name} SET {', '.join(f'{name} = ?' for name in others)} WHERE {place}"
        sql(journal, change, *others.values(), *first)
        (broken,) = verify(journal).breaks
        assert broken.kind == f"projection:{table.name}"
        assert all(f"{name} is " in broken.detail for name in others)
        sql(journal, change, *before, *first)
    assert verify(journal).ok


def test_a_deleted_projection_row_is_found_at_the_journal_row_it_follows_from(journal: str) -> None:
    places = set()
    for table in FILLED:
        key = table.columns.keys()[0]
        sql(journal, f"DELETE FROM {table.name} WHERE {key} = (SELECT max({key}) FROM {table.name})")
        found = [broken for broken in verify(journal).breaks if broken.kind == f"projection:{table.name}"]
        assert found, table.name
        places.update(broken.seq for broken in found)
    assert min(places) > 0


def test_a_projection_row_from_nowhere_is_found(journal: str) -> None:
    sql(journal, "INSERT INTO traces VALUES ('t', NULL, 'acme', NULL, NULL, NULL, 5, ?, NULL, 9)", True)
    assert verify(journal).breaks == [Break("main", 9, "projection:traces")]


def rewritten(url: str, change: dict[str, Any], at: int) -> None:
    """Forge row ``at`` and hash the whole chain anew, head included, as an attacker with the code would."""
    rows = sql(url, "SELECT seq, body FROM journal ORDER BY seq")
    prev = GENESIS
    for seq, raw in rows:
        body = raw
        if seq == at:
            body = orjson.dumps(orjson.loads(raw) | change, option=orjson.OPT_SORT_KEYS).decode()
        digest = row_hash(MAIN_PREFIX, seq, prev, body.encode())
        sql(url, "UPDATE journal SET prev = ?, hash = ?, body = ? WHERE seq = ?", prev, digest, body, seq)
        prev = digest
    sql(url, "UPDATE journal_head SET hash = ?", prev)


def test_a_chain_rewritten_whole_differs_from_the_checkpoint_kept_outside(journal: str) -> None:
    size, digest = verify(journal).head
    early = bytes(sql(journal, "SELECT hash FROM journal WHERE seq = 3")[0][0]).hex()
    rewritten(journal, {"reason": "forged"}, at=6)
    assert verify(journal).ok
    assert verify(journal, [(3, early)]).ok
    assert verify(journal, [(3, early.upper()), (size, digest)]).breaks == [Break("main", size, "checkpoint")]


def test_a_checkpoint_behind_the_end_is_broken(journal: str) -> None:
    assert verify(journal, [(ROWS + 5, "00" * 32)]).breaks == [Break("main", ROWS + 5, "checkpoint")]
    assert verify(journal, [(0, "11" * 32)]).breaks == [Break("main", 0, "checkpoint")]


def test_a_record_that_contradicts_those_before_it_is_found_in_a_perfect_chain(journal: str) -> None:
    (seq,) = sql(journal, "SELECT seq FROM journal WHERE kind = 'governance.changed'")[0]
    rewritten(journal, {"epoch": 9}, at=seq)
    found = verify(journal).breaks
    assert Break("main", seq, "projection:governance") in found


def test_a_body_that_is_not_canonical_is_found_in_a_perfect_chain(journal: str) -> None:
    (raw,) = sql(journal, "SELECT body FROM journal WHERE seq = ?", ROWS)[0]
    (prev,) = sql(journal, "SELECT prev FROM journal WHERE seq = ?", ROWS)[0]
    loose = raw.replace(":", ": ", 1)
    digest = row_hash(MAIN_PREFIX, ROWS, bytes(prev), loose.encode())
    sql(journal, "UPDATE journal SET hash = ?, body = ? WHERE seq = ?", digest, loose, ROWS)
    sql(journal, "UPDATE journal_head SET hash = ?", digest)
    assert verify(journal).breaks == [Break("main", ROWS, "body")]


@pytest.mark.parametrize("body", ["", "[]", "nothing", '{"kind":"decision"}'])
def test_a_body_that_is_no_record_is_found(journal: str, body: str) -> None:
    sql(journal, "UPDATE journal SET body = ? WHERE seq = 2", body)
    assert {"hash", "body"} <= kinds(verify(journal), 2)


def test_text_that_is_not_utf8_is_found_and_the_rest_still_checked(original: Path, scratch: Path) -> None:
    report = damaged(
        original,
        scratch,
        ("UPDATE journal SET body = CAST(X'FF00' AS TEXT) WHERE seq = 2", ()),
        ("UPDATE journal SET kind = CAST(X'FE' AS TEXT) WHERE seq = 9", ()),
        ("UPDATE runs SET tenant_id = CAST(X'FE' AS TEXT) WHERE run_id = 'run-0'", ()),
    )
    assert {"hash", "body"} <= kinds(report, 2)
    assert kinds(report, 9) == {"column:kind"}
    assert "projection:runs" in kinds(report)
    assert report.rows == ROWS


@pytest.mark.parametrize("table", PROJECTIONS, ids=str)
def test_text_of_a_projection_that_is_not_utf8_is_found_and_named(original: Path, scratch: Path, table: Table) -> None:
    for name in [column.name for column in table.columns if isinstance(column.type, Text)]:
        with closing(sqlite3.connect(original)) as file:
            ((filled,),) = file.execute(f"SELECT count({name}) FROM {table.name}")
        bad = f"CAST(X'FF' || substr({name}, 2) AS TEXT)"
        report = damaged(original, scratch, (f"UPDATE {table.name} SET {name} = {bad}", ()))
        assert kinds(report) == ({f"projection:{table.name}"} if filled else set()), name
        assert report.rows == ROWS


def test_a_stream_that_is_not_utf8_is_found_at_its_place(original: Path, scratch: Path) -> None:
    bad = "SET stream = CAST(X'FF' || 'ain' AS TEXT)"
    report = damaged(original, scratch, (f"UPDATE journal {bad} WHERE seq = 5", ()))
    assert {Break("main", 5, "gap"), Break("\udcffain", 5, "head")} <= set(report.breaks)
    report = damaged(original, scratch, (f"UPDATE journal_head {bad}", ()))
    assert report.breaks == [Break("main", ROWS, "head"), Break("\udcffain", 0, "head")]


def torn(original: Path, scratch: Path, page: int) -> VerifyReport:
    """A copy of which one page is no page of a tree any more."""
    for leftover in scratch.parent.iterdir():
        leftover.unlink()
    content = bytearray(original.read_bytes())
    content[(page - 1) * 4096] = 0
    scratch.write_bytes(content)
    return verify(f"sqlite:///{scratch}")


def test_a_page_that_cannot_be_read_is_a_break_behind_the_last_good_row(original: Path, scratch: Path) -> None:
    seq, marker = 12, b'"decision_id":"d-1"'
    report = torn(original, scratch, original.read_bytes().index(marker) // 4096 + 1)
    (place,) = (found.seq for found in report.breaks if found.kind == "unreadable")
    assert 0 < place == report.rows < seq
    assert "index" in kinds(report)
    with closing(sqlite3.connect(scratch)) as file:
        rows = file.execute("SELECT seq FROM journal NOT INDEXED ORDER BY rowid")
        assert [row[0] for row in islice(rows, place)] == list(range(1, place + 1))
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            next(rows)


def test_a_projection_that_cannot_be_read_is_a_break_that_names_it(original: Path, scratch: Path) -> None:
    with closing(sqlite3.connect(original)) as file:
        ((page,),) = file.execute("SELECT rootpage FROM sqlite_master WHERE name = 'outbox'")
    report = torn(original, scratch, page)
    assert report.rows == ROWS
    assert Break("main", 0, "projection:outbox") in report.breaks


def test_a_schema_that_cannot_be_read_is_a_break(original: Path, scratch: Path) -> None:
    statements = ("PRAGMA writable_schema=ON", "UPDATE sqlite_master SET sql = 'CREATE TABLE x' WHERE name = 'runs'")
    report = damaged(original, scratch, *((statement, ()) for statement in statements))
    assert (kinds(report), report.rows) == ({"unreadable", "index"}, 0)


@pytest.mark.postgresql
def test_what_postgresql_finds_damaged_is_a_break(journal_postgresql_url: str) -> None:
    assert all_committed(asyncio.run(write(journal_postgresql_url, day())))
    sql(journal_postgresql_url, "ALTER TABLE outbox RENAME TO sound")
    sql(
        journal_postgresql_url,
        "CREATE FUNCTION torn(text) RETURNS text LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'invalid page' USING ERRCODE = 'data_corrupted'; END $$",
    )
    columns = "tx_id, run_id, n, type, state, seq"
    sql(journal_postgresql_url, f"CREATE VIEW outbox AS SELECT torn(event_id) AS event_id, {columns} FROM sound")
    report = verify(journal_postgresql_url)
    assert report.breaks == [Break("main", 0, "projection:outbox"), Break("main", ROWS, "unreadable")]


def test_all_breaks_are_reported(journal: str) -> None:
    sql(journal, "UPDATE journal SET unit = 'x' WHERE seq IN (3, 5)")
    sql(journal, "DELETE FROM journal WHERE seq = 8")
    sql(journal, "UPDATE runs SET state = 'open' WHERE run_id = 'run-0'")
    found = [(brk.seq, brk.kind) for brk in verify(journal).breaks]
    assert {(3, "column:unit"), (5, "column:unit"), (8, "gap")} <= set(found)
    assert "projection:runs" in {kind for _, kind in found}


def test_an_index_that_hides_a_row_is_found(original: Path, scratch: Path) -> None:
    report = damaged(
        original,
        scratch,
        ("PRAGMA writable_schema=ON", ()),
        (
            "UPDATE sqlite_master SET sql = replace(sql, 'IS NOT NULL', 'IS NULL') WHERE name = 'journal_run'",
            (),
        ),
    )
    assert kinds(report) == {"index"}


def test_many_rows_need_little_memory_and_projections_survive_page_borders(journal_url: str) -> None:
    units = [Unit("s", [started()])]
    units += [Unit(f"d{n}", [decided(f"d{n}")]) for n in range(6_000)]
    units += [Unit(f"e{n}", [ended(f"d{n}")]) for n in range(0, 6_000, 2)]
    assert all_committed(asyncio.run(write(journal_url, units)))
    report = verify(journal_url)
    assert (report.ok, report.rows) == (True, 9_001)
    sql(journal_url, "DELETE FROM open_decisions WHERE decision_id = 'd5999'")
    assert verify(journal_url).breaks == [Break("main", 6_001, "projection:open_decisions")]


def test_writers_may_go_on_while_it_runs(journal_url: str) -> None:
    async def both() -> list[VerifyReport]:
        await write(journal_url, day())
        going = True

        async def traffic() -> None:
            number = 0
            while going:
                number += 1
                await write(journal_url, [Unit(f"u{number}", [started(f"more-{number}")])])

        task = asyncio.ensure_future(traffic())
        reports = [await asyncio.to_thread(verify, journal_url) for _ in range(3)]
        going = False
        await task
        return reports

    assert all(report.ok for report in asyncio.run(both()))


def test_what_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(JournalUnavailable, match="there is no journal"):
        verify(f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_a_journal_cannot_be_verified(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE something (id INTEGER)")
    with pytest.raises(SchemaMismatch, match="holds no journal"):
        verify(journal_url)


def test_a_newer_schema_cannot_be_verified(journal: str) -> None:
    sql(journal, "UPDATE spine_meta SET value = '2' WHERE key = 'schema_version'")
    with pytest.raises(SchemaMismatch, match="upgrade hoc-spine"):
        verify(journal)


def test_a_file_that_is_no_database_cannot_be_verified(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(JournalError, match="not a database"):
        verify(f"sqlite:///{tmp_path}/x.db")


def test_a_journal_without_one_of_its_tables_cannot_be_verified(journal: str) -> None:
    sql(journal, "DROP TABLE outbox")
    with pytest.raises(JournalUnavailable, match="outbox"):
        verify(journal)
