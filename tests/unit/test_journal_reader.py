"""Reading beside the writer: lookups, lists, and whether the rows behind an answer are intact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from spine.governance.units import Committed, GuardFailed, Record, Unit
from spine.journal.reader import JournalReader
from spine.journal.rows import Counts
from spine.journal.verify import verify
from spine.kernel.errors import JournalBroken, JournalUnavailable, SchemaMismatch
from tests.unit.journal_kit import (
    acknowledged,
    all_committed,
    begun,
    committed,
    day,
    decided,
    event,
    published,
    reading,
    reconciled,
    sql,
    started,
    switched,
    write,
    writing,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


@pytest.fixture
async def reader(journal_url: str) -> AsyncIterator[JournalReader]:
    assert all_committed(await write(journal_url, day()))
    async with reading(journal_url) as found:
        yield found


async def test_a_run_is_found_with_all_its_rows_in_order(reader: JournalReader) -> None:
    run = await reader.run("run-1")
    assert run is not None
    assert (run.tenant_id, run.agent_id, run.implicit, run.state) == ("acme", "a7", False, "committed")
    assert (run.started_seq, run.completed_seq, run.tx_id, run.run_status) == (10, 18, "tx-1", "succeeded")
    rows = await reader.run_rows("run-1")
    assert [row.seq for row in rows] == list(range(10, 19))
    assert [row.body["kind"] for row in rows] == [
        "run.started",
        "decision",
        "outcome",
        "decision",
        "tx.begun",
        "tx.step",
        "ack",
        "event",
        "tx.committed",
    ]
    assert await reader.run("none") is None
    assert await reader.run_rows("none") == []


async def test_run_ids_are_completed_from_a_prefix(reader: JournalReader, journal_url: str) -> None:
    await write(journal_url, [Unit("odd", [started("run%_x"), started("Run-9"), started("run-\u00fc")])])
    assert await reader.run_ids_like("run-") == ["run-0", "run-1", "run-2", "run-\u00fc"]
    assert await reader.run_ids_like("run-", limit=2) == ["run-0", "run-1"]
    assert await reader.run_ids_like("run%") == ["run%_x"]
    assert await reader.run_ids_like("") == ["Run-9", "run%_x", "run-0", "run-1", "run-2", "run-\u00fc"]


@pytest.mark.parametrize("run_id", ["\ud800", "run-\udcff", "run-1\x00"])
async def test_an_id_that_no_database_can_hold_is_that_of_no_run(reader: JournalReader, run_id: str) -> None:
    assert await reader.run(run_id) is None
    assert await reader.run_rows(run_id) == []
    assert await reader.run_ids_like(run_id) == []


async def test_runs_are_listed_newest_first_and_page_by_page(reader: JournalReader, journal_url: str) -> None:
    await write(journal_url, [Unit("more", [started("open-1")])])
    assert [run.run_id for run in await reader.runs(2)] == ["open-1", "run-2"]
    before = (await reader.runs(2))[-1].started_seq
    assert [run.run_id for run in await reader.runs(9, before=before)] == ["run-1", "run-0"]
    assert [run.run_id for run in await reader.runs(state="open")] == ["open-1"]


async def test_lookups_by_key_place_and_transaction(reader: JournalReader) -> None:
    claim = await reader.idempotency("acme", "refunds.issue", "k-0")
    assert claim is not None
    assert (claim.state, claim.decision_id) == ("done", "d-0")
    assert claim.seq_outcome is not None
    assert (await reader.body_at(claim.seq_outcome))["kind"] == "outcome"
    assert await reader.idempotency("other tenant", "refunds.issue", "k-0") is None
    with pytest.raises(JournalBroken, match="99"):
        await reader.body_at(99)
    transaction = await reader.transaction("run-0", "")
    assert transaction is not None
    assert (transaction.tx_id, transaction.state, transaction.phase) == ("tx-0", "COMMITTED", "COMMITTED")
    assert await reader.transaction("run-0", "other key") is None


async def test_the_tail_goes_on_where_it_left_off(reader: JournalReader) -> None:
    first = await reader.tail(0, 4)
    assert [row.seq for row in first] == [1, 2, 3, 4]
    assert [row.seq for row in await reader.tail(first[-1].seq, 3)] == [5, 6, 7]
    assert await reader.tail(31) == []


async def test_counts_are_what_the_tables_hold(reader: JournalReader) -> None:
    assert await reader.counts() == Counts(
        rows=31,
        runs=3,
        runs_open=0,
        runs_committed=3,
        runs_aborted=0,
        runs_parked=0,
        decisions_open=3,
        transactions=3,
        transactions_in_flight=0,
        transactions_parked=0,
        events=3,
        events_pending=2,
        contracts_pending=3,
        contracts_complete=0,
        contracts_incomplete=0,
        contracts_stale=0,
    )


async def test_the_governance_state_is_the_last_committed(reader: JournalReader) -> None:
    state = await reader.governance()
    assert (state.state, state.epoch, state.reason, state.actor, state.since_at) == (
        "degraded",
        2,
        "drill",
        "ops",
        4_000,
    )


async def test_a_new_journal_is_active_at_epoch_1(journal_url: str) -> None:
    await write(journal_url, [])
    async with reading(journal_url) as reader:
        state = await reader.governance()
        assert (state.state, state.epoch, state.seq, (await reader.head()).size) == ("active", 1, 0, 0)


async def test_contracts_are_due_from_their_moment_on_the_earliest_first(journal_url: str) -> None:
    promised = [
        started(run, expectations=[{"domain": "a", "action": "b", "deadline_s": seconds}])
        for run, seconds in (("late", 9), ("b", 5), ("a", 5), ("judged", 1))
    ]
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        await writer.commit([Unit("u", [*promised, started("free")])])
        assert all_committed(await writer.commit([Unit("v", [reconciled("judged", previous=4)])]))
        assert await reader.due_contracts(5_001_000, 9) == []
        due = await reader.due_contracts(9_001_001, 2)
        assert [(contract.run_id, contract.due_at) for contract in due] == [("a", 5_001_000), ("b", 5_001_000)]
        rest = await reader.due_contracts(9_001_001, 2, after=(5_001_000, "a"))
        assert [contract.run_id for contract in rest] == ["b", "late"]
        assert await reader.due_contracts(9_001_001, 2, after=(9_001_000, "late")) == []
        counts = await reader.counts()
    assert (counts.contracts_pending, counts.contracts_stale, counts.contracts_complete) == (3, 1, 0)
    assert verify(journal_url).ok


async def test_of_two_verdicts_over_the_same_row_one_stands(journal_url: str) -> None:
    """The other one is refused by name, alone, though they share a batch."""
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u", [started(expectations=[{"domain": "a", "action": "b", "deadline_s": 1}])])])
        outcomes = await writer.commit(
            [Unit(f"v{n}", [reconciled(overall=overall)]) for n, overall in enumerate(("STALE", "INCOMPLETE"))]
        )
        assert outcomes == [Committed(2, 2), GuardFailed("contract verdict", 1, 0)]
        (again,) = await writer.commit([Unit("w", [reconciled(overall="COMPLETE", previous=2)])])
        assert again == Committed(3, 3)
    assert sql(journal_url, "SELECT overall, seq FROM contracts") == [("COMPLETE", 3)]
    assert verify(journal_url).ok


async def test_the_rows_of_a_contract_are_its_start_reports_and_verdicts(journal_url: str) -> None:
    units = [
        Unit("u", [started(), decided("d"), begun("tx"), acknowledged("tx"), reconciled(previous=None)]),
        Unit("other", [started("run-2"), acknowledged("tx", "run-2")]),
    ]
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        assert all_committed(await writer.commit(units))
        assert [(row.seq, row.body["kind"]) for row in await reader.contract_rows("run-1")] == [
            (1, "run.started"),
            (4, "ack"),
            (5, "contract.reconciled"),
        ]
        assert await reader.contract_rows("nobody") == []


async def test_pending_events_come_in_order_until_they_are_published(journal_url: str) -> None:
    units = [Unit("u", [started(), begun("tx"), *(event(f"e{n}", "tx", n) for n in (2, 1, 0))])]
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        await writer.commit(units)
        assert [body["event_id"] for body in await reader.pending_events()] == ["e2", "e1", "e0"]
        assert [body["event_id"] for body in await reader.pending_events(1)] == ["e2"]
        await writer.commit([Unit("p", [published("e2", "e0")])])
        assert [body["event_id"] for body in await reader.pending_events()] == ["e1"]
        assert all_committed(await writer.commit([Unit("p2", [published("e2", "e1")])]))
        assert await reader.pending_events() == []


async def test_the_bypass_bill_counts_what_would_have_been_denied(journal_url: str) -> None:
    denial = {"code": "REFUND_LIMIT", "reason": "too much"}
    bypassed = [
        decided(f"d{n}", epoch=2, effect="bypassed", would_have=denial if n % 3 else None, final=True)
        for n in range(1_000)
    ]
    units = [
        Unit("before", [decided("early", effect="bypassed", would_have=denial, final=True)]),
        Unit("on", [switched("bypassed", 2)]),
        Unit("during", bypassed),
        Unit("quoted", [decided("q", epoch=2, params={"x": '"effect":"bypassed"'}, would_have=denial, final=True)]),
        Unit("off", [switched("active", 3)]),
        Unit("after", [decided("late", epoch=3, effect="bypassed", would_have=denial, final=True)]),
    ]
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        for unit in units[:4]:
            assert all_committed(await writer.commit([unit]))
        running = await reader.bypassed_denials(2, limit=3)
        assert all_committed(await writer.commit(units[4:]))
        count, bodies = await reader.bypassed_denials(2, limit=3)
    assert (count, [body["decision_id"] for body in bodies]) == (666, ["d1", "d2", "d4"])
    assert running == (count, bodies)


@pytest.mark.parametrize("run", ["run-0", "run-1", "run-2"])
async def test_untouched_evidence_is_intact(reader: JournalReader, run: str) -> None:
    assert await reader.run_evidence(run, await reader.run_rows(run))
    assert await reader.bound(await reader.tail(0))
    assert await reader.bound([])


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE journal SET body = replace(body, 'succeeded', 'Succeeded') WHERE seq = 18",
        "UPDATE journal SET body = 'damaged' WHERE seq = 12",
        "UPDATE journal SET hash = prev WHERE seq = 12",
        "UPDATE journal SET prev = hash WHERE seq = 12",
        "DELETE FROM journal WHERE seq = 9",
        "DELETE FROM journal WHERE seq = 14",
        "DELETE FROM journal WHERE seq = 19",
        "UPDATE journal SET prev = hash WHERE seq = 19",
    ],
)
async def test_damage_in_or_beside_a_runs_rows_is_seen(reader: JournalReader, journal_url: str, damage: str) -> None:
    sql(journal_url, damage)
    rows = await reader.run_rows("run-1")
    assert rows
    assert not await reader.run_evidence("run-1", rows)


HIDDEN = "seq > 20 AND run_id = 'long' AND ref = 'd-700'"


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (f"UPDATE journal SET run_id = NULL WHERE {HIDDEN}", True),
        (f"UPDATE journal SET run_id = 'other' WHERE {HIDDEN}", True),
        (f"UPDATE journal SET stream = 'other' WHERE {HIDDEN}", True),
        (f"DELETE FROM journal WHERE {HIDDEN}", True),
        ("UPDATE journal SET run_id = NULL WHERE run_id = 'long' AND kind = 'run.started'", True),
        ("UPDATE journal SET run_id = NULL WHERE run_id = 'long' AND kind = 'tx.committed'", True),
        ("UPDATE journal SET run_id = 'long' WHERE ref = 'd-700-other'", True),
        (f"UPDATE journal SET tenant_id = 'x', kind = 'x', ref = 'x' WHERE {HIDDEN}", False),
        ("UPDATE journal SET run_id = NULL WHERE run_id = 'other' AND ref = 'd-700-other'", False),
    ],
)
async def test_a_row_hidden_from_its_run_by_its_columns_is_seen(journal_url: str, change: str, seen: bool) -> None:
    quoted = {"run_id": "long"}
    between = [
        record
        for n in range(0, 1_500, 100)
        for record in (
            decided(f"d-{n}-before", None, params=quoted),
            decided(f"d-{n}", "long"),
            decided(f"d-{n}-other", "other", params=quoted),
        )
    ]
    records = [started("other"), started("long"), *between, begun("tx", "long"), committed("tx", "long")]
    assert all_committed(await write(journal_url, [*day(), Unit("u", [*records, decided("last", "other")])]))
    async with reading(journal_url) as reader:
        assert await reader.run_evidence("long", await reader.run_rows("long"))
        sql(journal_url, change)
        assert await reader.run_evidence("long", await reader.run_rows("long")) is not seen


async def test_evidence_of_a_long_run_is_looked_at_part_by_part(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spine.journal.evidence._RANGE", 7)
    name = 'odd "%_\\ \u00fc'
    units = [Unit(f"u{n}", [decided(f"d{n}", name if n % 5 == 0 else None)]) for n in range(51)]
    assert all_committed(await write(journal_url, units))
    async with reading(journal_url) as reader:
        assert await reader.run_evidence(name, await reader.run_rows(name))
        for hidden in range(5, 50, 5):
            sql(journal_url, "UPDATE journal SET run_id = NULL WHERE ref = ?", f"d{hidden}")
            assert not await reader.run_evidence(name, await reader.run_rows(name))
            sql(journal_url, "UPDATE journal SET run_id = ? WHERE ref = ?", name, f"d{hidden}")


async def test_damaged_text_is_read_and_seen(sqlite_url: str) -> None:
    await write(sqlite_url, day())
    sql(sqlite_url, "UPDATE journal SET body = CAST(X'FF' AS TEXT) WHERE seq = 12")
    sql(sqlite_url, "UPDATE journal SET body = X'00', prev = 'text' WHERE seq = 13")
    async with reading(sqlite_url) as reader:
        rows = await reader.run_rows("run-1")
        assert [row.body for row in rows if not row.body] == [{}, {}]
        assert not await reader.run_evidence("run-1", rows)


async def test_a_changed_head_is_seen_by_the_last_row(reader: JournalReader, journal_url: str) -> None:
    sql(journal_url, "UPDATE journal_head SET hash = (SELECT hash FROM journal WHERE seq = 1)")
    assert not await reader.bound(await reader.tail(30))
    assert await reader.run_evidence("run-1", await reader.run_rows("run-1"))


async def test_evidence_of_the_last_row_holds_while_others_write(journal_url: str) -> None:
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        await writer.commit([Unit("u0", [started()])])
        writes = [writer.commit([Unit(f"u{n}", [decided(f"d{n}")])]) for n in range(1, 30)]
        checks = [reader.run_evidence("run-1", await reader.run_rows("run-1")) for _ in range(10)]
        results = await asyncio.gather(*writes, *checks)
    assert all(result is True for result in results[29:])


async def test_many_readers_at_once_share_a_few_connections(reader: JournalReader) -> None:
    found = await asyncio.gather(*(reader.run(f"run-{n % 3}") for n in range(60)))
    assert all(run is not None for run in found)


async def test_a_reader_cannot_write(reader: JournalReader) -> None:
    with pytest.raises(JournalUnavailable, match=r"read.?only"):
        await reader._all("DELETE FROM runs")


async def test_reading_does_not_make_a_database(sqlite_url: str, tmp_path) -> None:
    reader = JournalReader(sqlite_url)
    with pytest.raises(JournalUnavailable, match="there is no journal"):
        await reader.head()
    await reader.close()
    assert list(tmp_path.iterdir()) == []


async def test_a_database_without_a_journal_and_a_newer_one_are_named(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE something (id INTEGER)")
    async with reading(journal_url) as reader:
        with pytest.raises(SchemaMismatch, match="holds no journal"):
            await reader.open()
    await write(journal_url, [])
    sql(journal_url, "UPDATE spine_meta SET value = '2'")
    async with reading(journal_url) as reader:
        with pytest.raises(SchemaMismatch, match="upgrade hoc-spine"):
            await reader.run("x")


async def test_a_server_that_is_not_there_is_named() -> None:
    async with reading("postgresql+psycopg://root@127.0.0.1:1/none") as reader:
        with pytest.raises(JournalUnavailable, match="cannot be used"):
            await reader.head()


async def test_lost_head_and_governance_rows_are_named(reader: JournalReader, journal_url: str) -> None:
    sql(journal_url, "DELETE FROM journal_head")
    sql(journal_url, "DELETE FROM governance")
    with pytest.raises(JournalBroken, match="head"):
        await reader.head()
    with pytest.raises(JournalBroken, match="governance"):
        await reader.governance()


async def test_large_bodies_come_back_whole(journal_url: str) -> None:
    big = Record("run.denied", 1, {"run_id": "big", "x": "\u00e9" * 1_000_000})
    assert all_committed(await write(journal_url, [Unit("u", [big])]))
    async with reading(journal_url) as reader:
        (row,) = await reader.run_rows("big")
        assert row.body["x"] == "\u00e9" * 1_000_000
        assert await reader.run_evidence("big", [row])
