"""What records change beside the journal, and that writing many at once changes the same as one after the other."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spine.governance.transactions import STEP_MOVES
from spine.governance.units import CommitOutcome, Unit
from spine.journal import projections as plain
from spine.journal import tx_projections as of_tx
from spine.journal.batch import Waves
from spine.journal.domain_rows import DOMAIN_COLUMNS, INSERT_ROW
from spine.journal.domain_rows import DOMAIN_TABLES as DOMAIN_NAMES
from spine.journal.projections import CLOSE_DECISION, INSERT_DECISION, MAKERS, UPDATE_GOVERNANCE, projections
from spine.journal.statements import Statement
from spine.journal.tables import DOMAIN_TABLES, PROJECTIONS, metadata
from spine.journal.verify import verify
from tests.unit.journal_kit import (
    aborted,
    aborting,
    acknowledged,
    begun,
    claimed,
    committed,
    decided,
    domain,
    ended,
    incident,
    moved,
    published,
    reconciled,
    started,
    step,
    switched,
    writing,
)

pytestmark = pytest.mark.timeout(60)

STATEMENTS = [value for module in (plain, of_tx) for value in vars(module).values() if isinstance(value, Statement)]
STATEMENTS += [*INSERT_ROW.values(), *of_tx.MOVE_STEP.values(), *of_tx.MOVE_TRANSACTION.values()]


def body(record: object, unit: str = "u") -> dict[str, object]:
    return {**record.fields, "kind": record.kind, "at": record.at, "unit": unit}  # type: ignore[attr-defined]


def test_every_statement_names_tables_and_columns_that_exist() -> None:
    for statement in STATEMENTS:
        table = metadata.tables[statement.table]
        assert table in PROJECTIONS
        columns = re.search(r"INSERT INTO \w+ \(([^)]*)\)", statement.head)
        if columns is not None:
            assert set(columns.group(1).split(", ")) <= set(table.columns.keys())


def test_ranks_are_unique_and_put_inserts_before_updates_before_deletes() -> None:
    ordered = sorted(STATEMENTS, key=lambda statement: statement.rank)
    assert len({statement.rank for statement in ordered}) == len(ordered)
    verbs = [statement.head.split(maxsplit=1)[0] for statement in ordered]
    assert verbs == sorted(verbs, key=["INSERT", "UPDATE", "DELETE"].index)


def test_the_domain_tables_have_the_columns_of_their_rows() -> None:
    assert [table.name for table in DOMAIN_TABLES] == list(DOMAIN_NAMES)
    for table in DOMAIN_TABLES:
        assert table.columns.keys() == [*DOMAIN_COLUMNS, "seq"]


def test_a_kind_without_tables_changes_none() -> None:
    assert projections({"kind": "run.denied"}, 1) == []
    assert projections({"kind": "made up later"}, 1) == []
    assert "governance.report" not in MAKERS


def test_a_deadline_is_counted_from_the_start_in_microseconds() -> None:
    promise = {"domain": "logs", "action": "start_trace", "deadline_s": 1.5}
    found = projections(body(started(expectations=[promise])), 7)
    assert found[1][1] == ("run-1", "logs", "start_trace", 1_000 + 1_500_000)


def test_a_decision_and_its_outcome_in_one_wave_need_no_statement() -> None:
    waves = Waves()
    for seq, record in enumerate([decided("d1"), ended("d1"), decided("d2")], start=1):
        for statement, params in projections(body(record), seq):
            waves.add(statement, params)
    assert [(statement, [row[0] for row in rows]) for statement, rows in waves] == [(INSERT_DECISION, ["d2"])]


def test_a_second_change_of_one_row_begins_a_new_wave() -> None:
    waves = Waves()
    for seq, record in enumerate([switched("halted", 2), decided("d1"), switched("active", 3), ended("d0")], start=1):
        for statement, params in projections(body(record), seq):
            waves.add(statement, params)
    assert [statement for statement, _ in waves] == [
        INSERT_DECISION,
        UPDATE_GOVERNANCE,
        UPDATE_GOVERNANCE,
        CLOSE_DECISION,
    ]


def test_a_contract_waits_from_the_start_unless_it_is_judged_in_the_same_unit() -> None:
    first = projections(body(started(expectations=[PROMISE])), 7)[-1]
    assert first == (plain.INSERT_CONTRACT, ("run-1", "PENDING", 1_000 + 30_000_000, 7))
    assert all(statement is not plain.INSERT_CONTRACT for statement, _ in projections(body(started()), 7))
    judged = projections(body(reconciled(previous=None, due_at=5)), 8)
    assert judged == [(plain.INSERT_CONTRACT, ("run-1", "STALE", 5, 8))]


def test_a_verdict_replaces_the_row_it_names_and_no_other() -> None:
    assert projections(body(reconciled(previous=7)), 9) == [(plain.UPDATE_CONTRACT, ("STALE", None, 9, "run-1", 7))]
    with pytest.raises(KeyError):
        projections({"kind": "contract.reconciled", "run_id": "run-1", "overall": "STALE", "due_at": None}, 9)


PROMISE = {"domain": "incidents", "action": "create_incident", "deadline_s": 30}
NAMES = st.sampled_from(["a", "b"])
UNITS = st.one_of(
    st.builds(lambda run: [started(run)], NAMES),
    st.builds(
        lambda d, key, final, attempt: [decided(d, "a", key=key, final=final, attempt=attempt)],
        NAMES,
        st.sampled_from([None, "k"]),
        st.booleans(),
        st.integers(1, 2),
    ),
    st.builds(
        lambda d, key, code: [ended(d, "a", key=key, error_code=code)],
        NAMES,
        st.sampled_from([None, "k"]),
        st.sampled_from([None, "INTERRUPTED"]),
    ),
    st.builds(lambda epoch: [switched("halted", epoch)], st.integers(2, 4)),
    st.builds(lambda tx, run, attempt: [begun(tx, run, attempt=attempt)], NAMES, NAMES, st.integers(1, 2)),
    st.builds(lambda tx, run: [begun(tx, run, domains=[domain(0, "payments", "EXTERNAL")])], NAMES, NAMES),
    st.builds(
        lambda tx, move, epoch: [moved(tx, move, epoch=epoch)],
        NAMES,
        st.sampled_from([move.name for move in STEP_MOVES]),
        st.integers(1, 2),
    ),
    st.builds(lambda tx, epoch: [claimed(tx, epoch)], NAMES, st.integers(2, 3)),
    st.builds(lambda tx, run: [aborting(tx, run)], NAMES, NAMES),
    st.builds(lambda tx, run: [aborting(tx, run), aborted(tx, run)], NAMES, NAMES),
    st.builds(lambda tx, n, state: [step(tx, n, "a", state=state)], NAMES, st.integers(0, 1), st.sampled_from("XY")),
    st.builds(lambda tx, run: [committed(tx, run)], NAMES, NAMES),
    st.builds(lambda tx, run: [aborted(tx, run)], NAMES, NAMES),
    st.builds(lambda tx, row: [step(tx, 0, "a", rows=[incident(row)])], NAMES, NAMES),
    st.builds(lambda event_id: [published(event_id)], NAMES),
    st.builds(lambda run: [started(run, expectations=[PROMISE])], NAMES),
    st.builds(lambda run, previous: [reconciled(run, previous=previous)], NAMES, st.sampled_from([None, 1, 2])),
    st.builds(lambda run: [started(run), reconciled(run, previous=None)], NAMES),
    st.builds(lambda run, judged: [acknowledged("a", run, contract=judged)], NAMES, st.integers(1, 2)),
)
BATCHES = st.lists(st.lists(st.tuples(UNITS, st.sampled_from([None, 1, 2])), max_size=8), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(batches=BATCHES)
def test_batches_end_as_their_units_would_one_by_one(batches: list[list[tuple[list[object], int | None]]]) -> None:
    named = [
        [Unit(f"u{b}-{n}", records, epoch=epoch) for n, (records, epoch) in enumerate(batch)]  # type: ignore[arg-type]
        for b, batch in enumerate(batches)
    ]

    async def run(path: Path, groups: list[list[Unit]]) -> list[CommitOutcome]:
        async with writing(f"sqlite:///{path}") as writer:
            return [outcome for group in groups for outcome in await writer.commit(group)]

    with tempfile.TemporaryDirectory() as folder:
        together, apart = Path(folder, "together.db"), Path(folder, "apart.db")
        grouped = asyncio.run(run(together, named))
        single = asyncio.run(run(apart, [[unit] for batch in named for unit in batch]))
        assert grouped == single
        reports = [verify(f"sqlite:///{path}") for path in (together, apart)]
        assert [report.breaks for report in reports] == [[], []]
        assert reports[0].head == reports[1].head
