"""The tables that a statement's text names as what it changes."""

from __future__ import annotations

import pytest

from spine.journal.written_tables import targets


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("INSERT INTO journal VALUES (1)", [("", "journal")]),
        ("insert or replace into Journal(a) values (1)", [("", "journal")]),
        ("REPLACE INTO main . journal VALUES (1)", [("main", "journal")]),
        ('INSERT INTO "my""s".[runs] VALUES (1)', [('my""s', "runs")]),
        ("UPDATE OR IGNORE `runs` SET a = 1", [("", "runs")]),
        ("DELETE FROM 'runs'", [("", "runs")]),
        ("DELETE /* from nowhere */ FROM -- the journal\n ONLY (journal) AS j", [("", "journal")]),
        ("MERGE INTO a.b.runs USING bills ON true WHEN MATCHED THEN DELETE", [("b", "runs")]),
        ("WITH gone AS (DELETE FROM runs RETURNING id) UPDATE bills SET a = 1", [("", "runs"), ("", "bills")]),
        ("INSERT INTO bills SELECT run_id FROM runs", [("", "bills")]),
        ("UPDATE bills SET a = 1 FROM runs WHERE b = 'into runs' OR c = \"update runs\"", [("", "bills")]),
        ("INSERT INTO bills VALUES (1) ON CONFLICT DO UPDATE SET a = 1", [("", "bills"), ("", "set")]),
        ("DELETE FROM", [("", "")]),
        ("UPDATE", [("", "")]),
        ("INSERT INTO x.", [("", "x")]),
    ],
)
def test_targets_are_told_from_what_is_read(sql: str, named: list[tuple[str, str]]) -> None:
    assert list(targets(sql)) == named
