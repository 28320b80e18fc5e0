"""A domain's own writes join the commit of their unit, and touch nothing of Spine's."""

from __future__ import annotations

import pytest

from spine.governance.units import Committed, GuardFailed, Unit, Write
from spine.journal.engine import parse_url
from spine.journal.tables import metadata
from spine.journal.verify import verify
from tests.unit.journal_kit import all_committed, completion, reading, sql, started, write, writing

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


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
        assert (outcomes[2].guard[:9], outcomes[2].found) == ("write 0: ", None)
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
        assert outcome.found is None, "it changed no count of rows: it did not run"
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
