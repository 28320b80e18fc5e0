"""Batches become one chain, whoever writes them and however large they are."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest

from spine.governance.units import Committed, Record, Unit
from spine.journal.chain import GENESIS, MAIN_PREFIX, row_hash
from spine.journal.verify import verify
from tests.unit.journal_kit import all_committed, day, decided, ended, reading, started, write, writing

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_units_are_chained_in_the_order_of_the_batch(journal_url: str) -> None:
    units = [Unit("u1", [started()]), Unit("u2", [decided("d1"), ended("d1")]), Unit("u3", [decided("d2")])]
    assert await write(journal_url, units) == [Committed(1, 1), Committed(2, 3), Committed(4, 4)]
    async with reading(journal_url) as reader:
        rows, head = await reader.tail(0), await reader.head()
    prev = GENESIS
    for seq, row in enumerate(rows, start=1):
        assert (row.seq, row.prev, row.hash) == (seq, prev, row_hash(MAIN_PREFIX, seq, prev, row.raw.encode()))
        prev = row.hash
    assert [row.body["unit"] for row in rows] == ["u1", "u2", "u2", "u3"]
    assert (head.size, head.hash) == (4, prev)


async def test_a_body_says_kind_time_and_unit_and_is_canonical(journal_url: str) -> None:
    await write(journal_url, [Unit("u1", [Record("run.denied", 42, {"b": "\u00fc\n\x00", "a": [1, None, True]})])])
    async with reading(journal_url) as reader:
        (row,) = await reader.tail(0)
    assert row.raw == '{"a":[1,null,true],"at":42,"b":"\u00fc\\n\\u0000","kind":"run.denied","unit":"u1"}'


async def test_both_databases_hold_the_same_bytes(sqlite_url: str, journal_postgresql_url: str) -> None:
    for url in (sqlite_url, journal_postgresql_url):
        assert all_committed(await write(url, day()))
    heads = []
    for url in (sqlite_url, journal_postgresql_url):
        async with reading(url) as reader:
            heads.append(await reader.head())
    assert heads[0] == heads[1]


async def test_a_whole_day_verifies(journal_url: str) -> None:
    assert all_committed(await write(journal_url, day()))
    report = verify(journal_url)
    assert (report.ok, report.breaks) == (True, [])


async def test_a_second_writer_goes_on_where_the_first_ended(journal_url: str) -> None:
    await write(journal_url, [Unit("u1", [started("a")])])
    assert await write(journal_url, [Unit("u2", [started("b")])]) == [Committed(2, 2)]
    assert verify(journal_url).ok


async def test_writers_on_one_database_take_turns(journal_url: str) -> None:
    async with writing(journal_url) as first, writing(journal_url) as second:
        for number in range(6):
            writer = first if number % 2 else second
            seq = number + 1
            assert await writer.commit([Unit(f"u{seq}", [started(f"run-{seq}")])]) == [Committed(seq, seq)]
    assert verify(journal_url).ok


async def test_concurrent_batches_of_two_writers_form_one_chain(journal_url: str) -> None:
    async with writing(journal_url) as first, writing(journal_url) as second:
        batches = [
            writer.commit([Unit(f"u{name}{n}-{k}", [started(f"{name}{n}-{k}")]) for k in range(3)])
            for n in range(20)
            for name, writer in (("a", first), ("b", second))
        ]
        outcomes = [outcome for batch in await asyncio.gather(*batches) for outcome in batch]
    assert all_committed(outcomes)
    assert len({outcome.first for outcome in outcomes if isinstance(outcome, Committed)}) == 120
    assert verify(journal_url).ok


async def test_no_units_are_no_work(journal_url: str) -> None:
    assert await write(journal_url, []) == []


async def test_large_batches_are_one_commit(journal_url: str) -> None:
    units = [Unit(f"u{n}", [decided(f"d{n}", None)]) for n in range(2_345)]
    async with writing(journal_url) as writer:
        outcomes = await writer.commit(units)
        assert outcomes == [Committed(n, n) for n in range(1, 2_346)]
        ends = [Unit(f"e{n}", [ended(f"d{n}", None)]) for n in range(1, 2_345)]
        assert all_committed(await writer.commit(ends))
    async with reading(journal_url) as reader:
        assert [found.decision_id for found in await reader.open_decisions(1)] == ["d0"]
    assert verify(journal_url).ok


async def test_find_units_looks_only_behind_the_row_it_is_given(journal_url: str) -> None:
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u1", [started("a")]), Unit("u2", [started("b"), started("c")])])
        assert await writer.find_units(["u1", "u2", "u3"], 0) == {"u1": Committed(1, 1), "u2": Committed(2, 3)}
        assert await writer.find_units(["u1", "u2", "u3"], 1) == {"u2": Committed(2, 3)}
        assert await writer.find_units([f"x{n}" for n in range(1_000)], 0) == {}


async def test_the_first_statement_of_a_batch_locks_out_other_writers(sqlite_url: str) -> None:
    async with writing(sqlite_url) as writer:
        session = writer._core._session
        await writer._worker.call(session.begin)
        with (
            closing(sqlite3.connect(sqlite_url.partition("///")[2], timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("BEGIN IMMEDIATE")
        await writer._worker.call(session.rollback)
