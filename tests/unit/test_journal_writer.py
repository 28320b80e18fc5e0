"""Group commit: what a batch writes, which unit fails alone, and what the database's refusals become."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from spine.governance.units import Committed, GuardFailed, Record, StaleEpoch, StorageFailed, Unit, Write
from spine.journal.chain import GENESIS, MAIN_PREFIX, row_hash
from spine.journal.domain_rows import GUARD_ROW
from spine.journal.engine import parse_url
from spine.journal.faults import CommitUnknown, StorageError
from spine.journal.oslock import FileLock
from spine.journal.processes import _name, lives, this_process
from spine.journal.projections import (
    GUARD_DECISION_OPEN,
    GUARD_GOVERNANCE,
    GUARD_IDEMPOTENCY,
    GUARD_RUN,
)
from spine.journal.session import Session
from spine.journal.tables import metadata
from spine.journal.tx_projections import GUARD_RUN_KNOWN, GUARD_STEP, GUARD_TRANSACTION, GUARD_TRANSACTION_STATE
from spine.journal.verify import verify
from spine.journal.writer import JournalWriter
from spine.kernel.errors import ConfigurationError, JournalError, JournalUnavailable
from tests.unit.journal_kit import (
    aborted,
    aborting,
    all_committed,
    begun,
    committed,
    completion,
    day,
    decided,
    ended,
    incident,
    reading,
    sql,
    started,
    step,
    switched,
    write,
    writing,
)

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


@pytest.mark.parametrize(
    ("guard", "bad"),
    [
        (GUARD_RUN, [started("taken")]),
        (GUARD_IDEMPOTENCY, [decided("d9", key="taken")]),
        (GUARD_GOVERNANCE, [switched("halted", 3)]),
        (GUARD_TRANSACTION, [begun("other", "taken")]),
        (GUARD_TRANSACTION_STATE, [committed("never begun")]),
        (GUARD_RUN_KNOWN, [begun("of nobody", "nobody"), committed("of nobody", "nobody")]),
        (GUARD_DECISION_OPEN, [ended("never decided")]),
        (GUARD_ROW, [step("taken", 1, rows=[incident("taken")])]),
        (GUARD_STEP, [step("taken")]),
    ],
)
async def test_a_unit_whose_guard_fails_fails_alone(journal_url: str, guard: str, bad: list[Record]) -> None:
    before = [
        Unit("b1", [started("taken")]),
        Unit("b2", [decided("d0", "taken", key="taken")]),
        Unit("b3", [begun("taken", "taken"), step("taken", rows=[incident("taken")])]),
    ]
    good = [Unit("g1", [started("good-1")]), Unit("g2", [started("good-2")])]
    async with writing(journal_url) as writer:
        assert all_committed(await writer.commit(before))
        outcomes = await writer.commit([good[0], Unit("bad", bad), good[1]])
        assert [type(outcome) for outcome in outcomes] == [Committed, GuardFailed, Committed]
        assert outcomes[1] == GuardFailed(guard, 1, 0)
        assert await writer.find_units(["g1", "bad", "g2"], 0) == {"g1": outcomes[0], "g2": outcomes[2]}
    assert verify(journal_url).ok


async def test_of_two_claims_in_one_batch_the_first_wins(journal_url: str) -> None:
    outcomes = await write(
        journal_url,
        [
            Unit("u1", [decided("d1", key="k")]),
            Unit("u2", [decided("d2", key="k")]),
            Unit("u3", [started()]),
            Unit("u4", [started()]),
        ],
    )
    assert outcomes == [
        Committed(1, 1),
        GuardFailed(GUARD_IDEMPOTENCY, 1, 0),
        Committed(2, 2),
        GuardFailed(GUARD_RUN, 1, 0),
    ]


BAD_RECORDS: list[tuple[list[Record], str]] = [
    ([], "without records"),
    ([Record("event", 1, {"event_id": "e"})], "missing field 'n'"),
    ([Record("decision", 1, {"decision_id": "\ud800"})], "surrogates"),
    ([Record("lesson", 1, {"x": object()})], "not JSON serializable"),
    ([Record("lesson", 1, {"x": 2**70})], "exceeds"),
    ([Record("run.denied", 1, {"run_id": 5})], "5 is not text"),
    ([Record("lesson", 1, {"tenant_id": "t", "row": {"id": "1", "sneaky": 1}})], "no column 'sneaky'"),
    ([Record("tx.step", 1, step("t").fields | {"rows": [{"table": "runs", "row": {}}]})], "table 'runs'"),
    ([Record("governance.changed", 1, {"to": "halted", "epoch": "2"})], "governance.changed"),
    ([Record("decision", 1, {"decision_id": "d", "tenant_id": None, "operation": "o", "final": False})], "inst"),
    ([decided("d", tenant_id=None)], "record: "),
]


async def test_units_that_cannot_be_recorded_fail_alone(journal_url: str) -> None:
    units = [Unit("g1", [started("a")])]
    units += [Unit(f"bad-{n}", bad) for n, (bad, _) in enumerate(BAD_RECORDS)]
    first, *outcomes, last = await write(journal_url, [*units, Unit("g2", [started("b")])])
    assert (first, last) == (Committed(1, 1), Committed(2, 2))
    for outcome, (_, reason) in zip(outcomes, BAD_RECORDS, strict=True):
        assert isinstance(outcome, GuardFailed)
        assert outcome.guard.startswith("record: ")
        assert reason in outcome.guard
    assert verify(journal_url).rows == 2


async def test_deep_nesting_is_refused_not_fatal(journal_url: str) -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    outcomes = await write(journal_url, [Unit("bad", [Record("lesson", 1, {"x": deep})]), Unit("g", [started()])])
    assert [type(outcome) for outcome in outcomes] == [GuardFailed, Committed]


async def test_a_decision_under_an_older_epoch_is_not_written(journal_url: str) -> None:
    async with writing(journal_url) as writer:
        units = [
            Unit("u1", [decided("d1")], epoch=1),
            Unit("u2", [switched("halted", 2)], epoch=1),
            Unit("u3", [decided("d2")], epoch=1),
            Unit("u4", [started("free")]),
            Unit("u5", [decided("d3")], epoch=2),
        ]
        assert await writer.commit(units) == [
            Committed(1, 1),
            Committed(2, 2),
            StaleEpoch(2),
            Committed(3, 3),
            Committed(4, 4),
        ]
        assert await writer.commit([Unit("u6", [decided("d4")], epoch=1)]) == [StaleEpoch(2)]
    assert verify(journal_url).rows == 4


async def test_another_process_switch_binds_from_its_commit(journal_url: str) -> None:
    async with writing(journal_url) as ours, writing(journal_url) as theirs:
        assert all_committed(await ours.commit([Unit("u1", [decided("d1")], epoch=1)]))
        assert all_committed(await theirs.commit([Unit("u2", [switched("halted", 2)], epoch=1)]))
        assert await ours.commit([Unit("u3", [decided("d2")], epoch=1)]) == [StaleEpoch(2)]
        assert await ours.commit([Unit("u4", [switched("active", 2)])]) == [GuardFailed(GUARD_GOVERNANCE, 1, 0)]


async def test_a_switch_committed_while_a_batch_waits_for_the_head_binds_it(journal_postgresql_url: str) -> None:
    import psycopg

    async with writing(journal_postgresql_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started()])]))
        with psycopg.connect(journal_postgresql_url.replace("+psycopg", "")) as other:
            other.execute("SELECT 1 FROM journal_head FOR UPDATE")
            waiting = asyncio.ensure_future(writer.commit([Unit("u2", [decided("d1")], epoch=1)]))
            await _until_blocked(journal_postgresql_url)
            other.execute("UPDATE journal_head SET size = size + 1, hash = prev.hash FROM journal prev")
            other.execute("UPDATE governance SET epoch = 2")
        assert await waiting == [StaleEpoch(2)]


async def _until_blocked(url: str) -> None:
    """Return once some backend of the database waits for a lock."""
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    while not (await asyncio.to_thread(sql, url, waits))[0][0]:
        await asyncio.sleep(0)


async def test_idempotency_keys_are_claimed_once_and_again_after_an_interruption(journal_url: str) -> None:
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        assert all_committed(await writer.commit([Unit("u1", [decided("d1", key="k")])]))
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert (claim.state, claim.digest, claim.seq_decision, claim.seq_outcome) == ("open", "0" * 64, 1, None)
        lost = ended("d1", key="k", success=False, error_code="INTERRUPTED")
        assert all_committed(await writer.commit([Unit("u2", [lost])]))
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert (claim.state, claim.seq_outcome) == ("interrupted", 2)
        again = [Unit(f"again-{n}", [decided(f"d{n}", key="k", attempt=2)]) for n in (2, 3)]
        assert await writer.commit(again) == [Committed(3, 3), GuardFailed(GUARD_IDEMPOTENCY, 1, 0)]
        assert all_committed(await writer.commit([Unit("u4", [ended("d2", key="k")])]))
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert (claim.state, claim.decision_id, claim.seq_decision, claim.seq_outcome) == ("done", "d2", 3, 4)
    assert verify(journal_url).ok


async def test_another_payload_cannot_take_an_interrupted_key(journal_url: str) -> None:
    lost = ended("d1", key="k", error_code="INTERRUPTED")
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u1", [decided("d1", key="k")]), Unit("u2", [lost])])
        other = decided("d2", key="k", attempt=2, params_digest="1" * 64)
        assert await writer.commit([Unit("u3", [other])]) == [GuardFailed(GUARD_IDEMPOTENCY, 1, 0)]


async def test_a_final_denial_claims_its_key_and_leaves_nothing_open(journal_url: str) -> None:
    await write(journal_url, [Unit("u1", [decided("d1", key="k", final=True, allowed=False)])])
    async with reading(journal_url) as reader:
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert claim.state == "denied"
        assert await reader.open_decisions(10**18) == []


async def test_claim_end_and_claim_again_in_one_batch_follow_the_order(journal_url: str) -> None:
    lost = ended("d1", key="k", error_code="INTERRUPTED")
    units = [
        Unit("u1", [decided("d1", key="k")]),
        Unit("u2", [lost]),
        Unit("u3", [decided("d2", key="k", attempt=2)]),
        Unit("u4", [ended("d2", key="k")]),
    ]
    assert all_committed(await write(journal_url, units))
    async with reading(journal_url) as reader:
        claim = await reader.idempotency("acme", "refunds.issue", "k")
    assert claim is not None
    assert (claim.state, claim.decision_id) == ("done", "d2")
    assert verify(journal_url).ok


async def test_an_abort_then_a_new_attempt_commits_the_run(journal_url: str) -> None:
    units = [
        Unit("u1", [started()]),
        Unit("u2", [begun("tx-1"), aborting("tx-1"), aborted("tx-1")]),
        Unit("u3", [begun("tx-2", attempt=2, previous="tx-1"), committed("tx-2")]),
    ]
    assert all_committed(await write(journal_url, units))
    async with reading(journal_url) as reader:
        run, transaction = await reader.run("run-1"), await reader.transaction("run-1", "")
    assert run is not None
    assert (run.state, run.run_status, run.tx_id, run.completed_seq) == ("committed", "succeeded", "tx-2", 6)
    assert transaction is not None
    assert (transaction.attempt, transaction.state, transaction.previous) == (2, "COMMITTED", "tx-1")
    assert verify(journal_url).ok


async def test_a_fenced_commit_changes_nothing(journal_url: str) -> None:
    fenced = committed("tx-1")
    fenced.fields["epoch"] = 7
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u1", [started(), begun("tx-1")])])
        assert await writer.commit([Unit("u2", [fenced])]) == [GuardFailed(GUARD_TRANSACTION_STATE, 1, 0)]
        assert all_committed(await writer.commit([Unit("u3", [committed("tx-1")])]))


async def test_a_domains_writes_join_the_commit(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE ledger (id TEXT PRIMARY KEY, cents BIGINT NOT NULL CHECK (cents > 0))")
    insert = "INSERT INTO ledger (id, cents) VALUES (:id, :cents)"
    async with writing(journal_url) as writer:
        outcomes = await writer.commit(
            [
                Unit("start", [started(f"run-{n}") for n in range(4)]),
                completion("tx-0", "run-0", [Write(insert, {"id": "a", "cents": 1})]),
                completion("tx-1", "run-1", [Write(insert, {"id": "b", "cents": -1})]),
                completion("tx-2", "run-2", [Write("UPDATE ledger SET cents = 2 WHERE id = :id", {"id": "none"})]),
                completion("tx-3", "run-3", [Write("DELETE FROM ledger WHERE id = :id", {"id": "none"}, rows=None)]),
            ]
        )
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "Committed",
            "Committed",
            "GuardFailed",
            "GuardFailed",
            "Committed",
        ]
        assert isinstance(outcomes[2], GuardFailed)
        assert outcomes[2].guard.startswith("write 0: ")
        assert outcomes[3] == GuardFailed("write 0: UPDATE ledger SET cents = 2 WHERE id = :id", 1, 0)
    assert sql(journal_url, "SELECT id, cents FROM ledger") == [("a", 1)]
    async with reading(journal_url) as reader:
        states = {run.run_id: run.state for run in await reader.runs()}
    assert states == {"run-0": "committed", "run-1": "open", "run-2": "open", "run-3": "committed"}
    assert verify(journal_url).ok


BAD_WRITES = [
    (Write("COMMIT"), "not COMMIT"),
    (Write("  ", {}), "not nothing"),
    (Write("SELECT 1"), "not SELECT"),
    (Write("DELETE FROM no_such_table"), "no_such_table"),
    (Write("DELETE FROM ledger WHERE id = :absent", {}), "absent"),
    (Write("UPDATE ledger SET id = :x", {"x": object()}, rows=None), "write 0: "),
]


async def test_writes_that_cannot_join_a_commit_fail_their_units(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE ledger (id TEXT PRIMARY KEY)")
    units = [Unit(f"bad-{n}", [started(f"bad-{n}")], [bad]) for n, (bad, _) in enumerate(BAD_WRITES)]
    first, *outcomes, last = await write(journal_url, [Unit("g1", [started("a")]), *units, Unit("g2", [started("b")])])
    assert (first, last) == (Committed(1, 1), Committed(2, 2))
    for outcome, (_, reason) in zip(outcomes, BAD_WRITES, strict=True):
        assert isinstance(outcome, GuardFailed)
        assert reason in outcome.guard
    assert verify(journal_url).rows == 2


@pytest.mark.parametrize("table", metadata.tables)
async def test_a_write_to_a_table_of_spines_own_fails_its_unit_by_name(journal_url: str, table: str) -> None:
    schema = "main" if parse_url(journal_url).path else sql(journal_url, "SELECT current_schema()")[0][0]
    texts = [f"DELETE FROM {table}", f"DELETE FROM {schema}.{table.upper()} AS x", f'UPDATE "{table}" SET no = 1']
    units = [Unit(f"u{n}", [started(f"r{n}")], [Write(text, rows=None)]) for n, text in enumerate(texts)]
    outcomes = await write(journal_url, [*units, Unit("g", [started("a")])])
    refusal = f"write 0: table {table} is Spine's own: "
    assert [getattr(outcome, "guard", "")[: len(refusal)] for outcome in outcomes] == [refusal] * 3 + [""]
    assert (report := verify(journal_url)).ok
    assert report.rows == 1


async def test_a_write_may_read_what_is_spines_own(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE ledger (id TEXT PRIMARY KEY)")
    copy = Write("INSERT INTO ledger SELECT r.run_id FROM runs r WHERE r.run_id = 'run-1'")
    assert all_committed(await write(journal_url, [Unit("u", [started()], [copy])]))
    assert sql(journal_url, "SELECT id FROM ledger") == [("run-1",)]


@pytest.mark.postgresql
async def test_a_table_of_another_schema_is_a_domains_own_whatever_its_name(journal_postgresql_url: str) -> None:
    sql(journal_postgresql_url, "CREATE SCHEMA IF NOT EXISTS crm")
    sql(journal_postgresql_url, "CREATE TABLE IF NOT EXISTS crm.incidents (id TEXT)")
    insert = Write("INSERT INTO crm.incidents (id) VALUES ('mine')")
    assert all_committed(await write(journal_postgresql_url, [Unit("u", [started()], [insert])]))


async def test_a_write_may_be_a_common_table_expression_or_return_rows(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE ledger (id TEXT PRIMARY KEY)")
    common = Write("WITH x(id) AS (SELECT 'a') INSERT INTO ledger SELECT id FROM x")
    returning = Write("INSERT INTO ledger (id) VALUES ('100%'), (:b) RETURNING id", {"b": "b"}, rows=2)
    assert all_committed(await write(journal_url, [Unit("u", [started()], [common, returning])]))
    assert sql(journal_url, "SELECT count(*) FROM ledger") == [(3,)]


async def test_find_units_looks_only_behind_the_row_it_is_given(journal_url: str) -> None:
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u1", [started("a")]), Unit("u2", [started("b"), started("c")])])
        assert await writer.find_units(["u1", "u2", "u3"], 0) == {"u1": Committed(1, 1), "u2": Committed(2, 3)}
        assert await writer.find_units(["u1", "u2", "u3"], 1) == {"u2": Committed(2, 3)}
        assert await writer.find_units([f"x{n}" for n in range(1_000)], 0) == {}


HOUR_US = 3_600_000_000


def leases(url: str) -> list[tuple[Any, ...]]:
    return sql(url, "SELECT instance, lease_until_at, started_at FROM instances")


async def until(true: Callable[[], Any]) -> None:
    with anyio.fail_after(10):
        while not true():
            await anyio.sleep(0.005)


async def test_a_lease_is_renewed_in_place_by_the_writer_itself_and_is_not_journaled(journal_url: str) -> None:
    """Nobody asks again: time alone moves it, once a third of it is over."""
    now = HOUR_US
    async with writing(journal_url, idle_s=0.01) as writer:
        await writer.commit([Unit("u1", [decided("d1")])])
        await writer.keep_lease("i1", 3.0, lambda: now)
        assert leases(journal_url) == [("i1", HOUR_US + 3_000_000, HOUR_US)]
        now += 999_999
        await writer.commit([Unit("u2", [started("a")])])
        assert leases(journal_url)[0][1] == HOUR_US + 3_000_000
        now += 1
        await until(lambda: leases(journal_url) == [("i1", HOUR_US + 4_000_000, HOUR_US)])
        now += 1_000_000
        await writer.commit([Unit("u3", [started("b")])])
        assert leases(journal_url) == [("i1", HOUR_US + 5_000_000, HOUR_US)]
        await writer.release_lease()
        assert leases(journal_url)[0][1] == 0
        now += HOUR_US
        await writer.commit([Unit("u4", [started("c")])])
        assert leases(journal_url)[0][1] == 0
    assert verify(journal_url).rows == 4


async def test_a_commit_does_not_wait_for_a_lease_that_cannot_be_renewed(sqlite_url: str) -> None:
    """Another process holds the lock: who wants to commit waits for it once, not once more for a renewal before."""
    now = HOUR_US
    async with writing(sqlite_url, busy_timeout_ms=2_000, idle_s=0.001) as writer:
        await writer.keep_lease("i1", 3.0, lambda: now)
        with _Locked(sqlite_url):
            now += 2_000_000
            for _ in range(3):
                await anyio.sleep(0.2)
                began = time.monotonic()
                (outcome,) = await writer.commit([Unit("u1", [started("a")])])
                assert isinstance(outcome, StorageFailed)
                assert time.monotonic() - began < 3.2
        await until(lambda: leases(sqlite_url) == [("i1", HOUR_US + 5_000_000, HOUR_US)])


def test_a_lease_is_given_back_when_the_loop_that_took_it_is_closed(journal_url: str) -> None:
    """A program that forgets to stop its Spine keeps nobody from taking over."""
    writer = JournalWriter(journal_url, idle_s=0.01)

    async def take() -> None:
        await writer.open()
        await writer.keep_lease("i1", 3.0, lambda: HOUR_US)

    asyncio.run(take())
    asyncio.run(until(lambda: leases(journal_url) == [("i1", 0, HOUR_US)]))
    asyncio.run(writer.close())


@pytest.mark.parametrize(
    ("lease", "process", "dead"),
    [
        (None, None, True),
        (HOUR_US - 1, "elsewhere/1/1", True),
        (HOUR_US, "elsewhere/1/1", False),
        (HOUR_US - 1, None, True),
        (HOUR_US, None, False),
        (0, "mine", True),
        (HOUR_US - 1, "mine", False),
        (HOUR_US + 1, "gone", True),
        (HOUR_US - 1, "gone", True),
        (HOUR_US + 1, "zombie", True),
    ],
)
async def test_who_is_dead_is_known_on_this_machine_and_told_by_the_lease_on_others(
    journal_url: str, lease: int | None, process: str | None, dead: bool
) -> None:
    """A living process of this machine may be held up longer than its lease; one that gave it back is out of it."""
    with ended_child() as zombie:
        names = {"mine": this_process(), "gone": this_process() + "0", "zombie": zombie}
        async with writing(journal_url) as writer, reading(journal_url) as reader:
            await writer.commit([Unit("u1", [decided("d1")])])
            if lease is not None:
                row = ("i1", lease, names.get(process or "", process))
                sql(journal_url, "INSERT INTO instances (instance, lease_until_at, process) VALUES (?, ?, ?)", *row)
            assert [found.decision_id for found in await reader.open_decisions(HOUR_US)] == (["d1"] if dead else [])
            assert await reader.living(HOUR_US) == (set() if dead else {"i1"})


@contextmanager
def ended_child() -> Iterator[str]:
    """The name of a child that has ended and that its parent has not yet asked for its end."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
        name = _name(child.pid)
        child.kill()
        while lives(name):
            time.sleep(0.005)
        yield name


async def test_cancelling_the_wait_does_not_undo_the_commit(journal_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on, commit = threading.Event(), threading.Event(), Session.commit

    def slow(session: Session) -> None:
        reached.set()
        assert go_on.wait(10)
        commit(session)

    async with writing(journal_url) as writer:
        monkeypatch.setattr(Session, "commit", slow)
        waiting = asyncio.ensure_future(writer.commit([Unit("u1", [started()])]))
        await asyncio.to_thread(reached.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        assert await writer.find_units(["u1"], 0) == {"u1": Committed(1, 1)}
        assert all_committed(await writer.commit([Unit("u2", [started("b")])]))
    assert verify(journal_url).ok


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_commit_is_looked_up(journal_url: str, monkeypatch: pytest.MonkeyPatch, applied: bool) -> None:
    commit, lost = Session.commit, [True]

    def losing(session: Session) -> None:
        if not lost:
            commit(session)
            return
        lost.clear()
        if applied:
            commit(session)
        raise CommitUnknown("the answer was lost")

    async with writing(journal_url) as writer:
        await writer.commit([Unit("u0", [started("zero")])])
        monkeypatch.setattr(Session, "commit", losing)
        outcomes = await writer.commit([Unit("u1", [started("a")]), Unit("u2", [started("b")])])
        if applied:
            assert outcomes == [Committed(2, 2), Committed(3, 3)]
        else:
            assert [type(outcome) for outcome in outcomes] == [StorageFailed, StorageFailed]
            assert not any(outcome.unknown for outcome in outcomes if isinstance(outcome, StorageFailed))
            assert await writer.find_units(["u1", "u2"], 0) == {}
        assert all_committed(await writer.commit([Unit("u3", [started("c")])]))
    assert verify(journal_url).ok


async def test_a_lost_commit_that_cannot_be_looked_up_is_unknown(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(session: Session) -> None:
        raise CommitUnknown("the answer was lost")

    def refusing(session: Session, *, create: bool) -> None:
        raise OSError("the network is gone")

    async with writing(journal_url) as writer:
        with monkeypatch.context() as broken:
            broken.setattr(Session, "commit", losing)
            broken.setattr(Session, "connect", refusing)
            (outcome,) = await writer.commit([Unit("u1", [started()])])
            assert isinstance(outcome, StorageFailed)
            assert outcome.unknown
            (outcome,) = await writer.commit([Unit("u2", [started()])])
            assert isinstance(outcome, StorageFailed)
            assert not outcome.unknown
        assert all_committed(await writer.commit([Unit("u3", [started()])]))


async def test_a_killed_connection_is_replaced(journal_postgresql_url: str) -> None:
    async with writing(journal_postgresql_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        sql(
            journal_postgresql_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query = 'COMMIT'",
        )
        first, second = await writer.commit([Unit("u2", [started("b")]), Unit("u3", [started("c")])])
        assert isinstance(first, StorageFailed)
        assert first == second
        assert not first.unknown
        assert await writer.commit([Unit("u4", [started("d")])]) == [Committed(2, 2)]
    assert verify(journal_postgresql_url).ok


async def test_a_lock_held_too_long_is_a_storage_failure_and_passes(journal_url: str) -> None:
    async with writing(journal_url, busy_timeout_ms=50) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        with _Locked(journal_url):
            outcomes = await writer.commit([Unit(f"b{n}", [started(f"b{n}")]) for n in range(3)])
            assert all(isinstance(outcome, StorageFailed) for outcome in outcomes)
            assert "lock" in str(outcomes[0])
        assert await writer.commit([Unit("u2", [started("c")])]) == [Committed(2, 2)]
    assert verify(journal_url).ok


async def test_a_lease_that_cannot_be_taken_says_so_and_is_taken_later(sqlite_url: str) -> None:
    async with writing(sqlite_url, busy_timeout_ms=50, idle_s=0.01) as writer:
        with _Locked(sqlite_url), pytest.raises(JournalUnavailable, match="lock"):
            await writer.keep_lease("i1", 3.0, lambda: HOUR_US)
        await until(lambda: leases(sqlite_url) == [("i1", HOUR_US + 3_000_000, HOUR_US)])


class _Locked:
    """Holds what a batch must lock."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        self._connection: Any
        if "sqlite" in self._url:
            self._connection = sqlite3.connect(self._url.partition("///")[2], isolation_level=None)
            self._connection.execute("BEGIN IMMEDIATE")
        else:
            import psycopg

            self._connection = psycopg.connect(self._url.replace("+psycopg", ""))
            self._connection.execute("SELECT 1 FROM journal_head FOR UPDATE")

    def __exit__(self, *_: object) -> None:
        self._connection.rollback() if "postgresql" in self._url else self._connection.execute("ROLLBACK")
        self._connection.close()


async def test_units_written_one_by_one_do_not_each_wait_for_a_broken_database(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_, begin = [], Session.begin

    def breaking(session: Session) -> None:
        begun_.append(session)
        if len(begun_) > 2:
            raise StorageError("the disk is gone")
        begin(session)

    async with writing(journal_url) as writer:
        await writer.commit([Unit("u0", [started("taken")])])
        monkeypatch.setattr(Session, "begin", breaking)
        units = [Unit("u1", [started("a")]), *(Unit(f"u{n}", [started("taken")]) for n in range(2, 9))]
        first, *rest = await writer.commit(units)
    assert first == Committed(2, 2)
    assert len(rest) == 7
    assert all(isinstance(outcome, StorageFailed) and not outcome.unknown for outcome in rest)
    assert len(begun_) == 3


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


async def test_a_full_database_refuses_and_goes_on_when_there_is_space(sqlite_url: str) -> None:
    async with writing(sqlite_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        connection = writer._core._session._connection
        limit = "PRAGMA max_page_count={}"
        pages = await writer._worker.call(lambda: connection.execute("PRAGMA page_count").fetchone()[0])
        await writer._worker.call(lambda: connection.execute(limit.format(pages)).fetchone())
        big = [Unit(f"big-{n}", [Record("run.denied", 1, {"x": "y" * 50_000})]) for n in range(2)]
        outcomes = await writer.commit(big)
        assert all(isinstance(outcome, StorageFailed) for outcome in outcomes)
        assert "full" in str(outcomes[0])
        # The next batch has a new connection, which knows nothing of the limit.
        assert await writer.commit(big) == [Committed(2, 2), Committed(3, 3)]
    assert verify(sqlite_url).ok


async def test_a_journal_that_went_back_is_not_continued(journal_url: str) -> None:
    async with writing(journal_url) as writer:
        assert all_committed(await writer.commit(day()))
        sql(journal_url, "UPDATE journal_head SET size = 1, hash = (SELECT hash FROM journal WHERE seq = 1)")
        (outcome,) = await writer.commit([Unit("u", [started("late")])])
        assert isinstance(outcome, StorageFailed)
        assert "went back" in outcome.error
    async with writing(journal_url) as writer:
        (outcome,) = await writer.commit([Unit("u", [started("late")])])
        assert isinstance(outcome, StorageFailed)
        assert "verify" in outcome.error


@pytest.mark.parametrize("table", ["journal_head", "governance"])
async def test_a_lost_head_or_governance_row_is_a_storage_failure(journal_url: str, table: str) -> None:
    async with writing(journal_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        sql(journal_url, f"DELETE FROM {table}")
        (outcome,) = await writer.commit([Unit("u2", [switched("halted", 2)])])
        assert isinstance(outcome, (StorageFailed, GuardFailed))
    with pytest.raises(JournalUnavailable, match="verify"):
        await write(journal_url, [Unit("u3", [started("b")])])


async def test_a_replaced_file_is_noticed(sqlite_url: str) -> None:
    path = Path(sqlite_url.partition("///")[2])
    moved = path.with_name("moved")
    async with writing(sqlite_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        path.rename(moved)
        (outcome,) = await writer.commit([Unit("u2", [started("b")])])
        assert isinstance(outcome, StorageFailed)
        assert not path.exists()
        path.write_bytes(b"")
        (outcome,) = await writer.commit([Unit("u2", [started("b")])])
        assert isinstance(outcome, StorageFailed)
        assert path.read_bytes() == b""
        moved.rename(path)
        assert await writer.commit([Unit("u3", [started("c")])]) == [Committed(2, 2)]


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


async def test_misuse_is_named(journal_url: str) -> None:
    writer = JournalWriter(journal_url)
    with pytest.raises(JournalError, match="not open"):
        await writer.commit([])
    await writer.close()
    await writer.open()
    with pytest.raises(JournalError, match="opened before"):
        await writer.open()
    await writer.close()
    await writer.close()
    with pytest.raises(JournalError, match="closed"):
        await writer.commit([])


async def test_close_finishes_what_was_given(journal_url: str) -> None:
    writer = JournalWriter(journal_url)
    await writer.open()
    given = [asyncio.ensure_future(writer.commit([Unit(f"u{n}", [started(f"r{n}")])])) for n in range(5)]
    await asyncio.sleep(0)
    await writer.close()
    assert all_committed([outcome for batch in await asyncio.gather(*given) for outcome in batch])


async def test_a_database_that_cannot_be_opened_says_so(tmp_path: Any) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/dir/x.db", "postgresql+psycopg://root@127.0.0.1:1/none"):
        with pytest.raises(JournalUnavailable, match="cannot be used"):
            await JournalWriter(url).open()
    with pytest.raises(ConfigurationError):
        JournalWriter("sqlite:///:memory:")


async def test_the_log_is_copied_back_when_idle_and_at_the_end(sqlite_url: str) -> None:
    copied, checkpoint = threading.Event(), Session.checkpoint

    with pytest.MonkeyPatch.context() as patch:

        def seen(session: Session, pages: int) -> bool:
            done = checkpoint(session, pages)
            copied.set()
            return done

        patch.setattr(Session, "checkpoint", seen)
        async with writing(sqlite_url, idle_s=0.01) as writer:
            assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
            assert await asyncio.to_thread(copied.wait, 10)
        assert not Path(sqlite_url.partition("///")[2] + "-wal").exists()


async def test_a_checkpoint_runs_only_while_no_other_process_writes(sqlite_url: str) -> None:
    async with writing(sqlite_url, idle_s=60) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        other = FileLock(Path(sqlite_url.partition("///")[2] + "-spine.lock"))
        assert other.share(0)
        wants_again = await writer._worker.call(writer._core.idle)
        assert wants_again
        other.release()
        wants_again = await writer._worker.call(writer._core.idle)
        assert not wants_again
        other.close()


async def test_a_batch_waits_for_another_process_checkpoint_only_so_long(sqlite_url: str) -> None:
    async with writing(sqlite_url, busy_timeout_ms=20) as writer:
        other = FileLock(Path(sqlite_url.partition("///")[2] + "-spine.lock"))
        assert other.own()
        (outcome,) = await writer.commit([Unit("u1", [started("a")])])
        assert isinstance(outcome, StorageFailed)
        assert "copying the log" in outcome.error
        other.release()
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        other.close()
