"""The rows of the built-in domains, which travel in the record and are written from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from spine.journal.statements import Fields, Operation, insert

GUARD_ROW: Final = "row claim"

DOMAIN_COLUMNS: Final = (
    "id",
    "run_id",
    "tenant_id",
    "kind",
    "status",
    "detail",
    "created_at",
    "is_synthetic",
    "synthetic_scenario_id",
)
DOMAIN_TABLES: Final = ("incidents", "policy_evaluations", "traces", "lessons")

INSERT_ROW: Final = {
    table: insert(table, 9 + place, GUARD_ROW, " ".join((*DOMAIN_COLUMNS, "seq")))
    for place, table in enumerate(DOMAIN_TABLES)
}


def domain_row(table: str, row: Mapping[str, Any], fields: Fields, seq: int) -> Operation:
    """The insert of a built-in domain's row. Raises ValueError naming a table or column that is not theirs."""
    statement = INSERT_ROW.get(table)
    if statement is None:
        raise ValueError(f"rows of table {table!r} do not go through the record: use a Write for tables of your own")
    unknown = row.keys() - set(DOMAIN_COLUMNS)
    if unknown:
        raise ValueError(f"table {table} has no column {min(unknown)!r}: put it into detail")
    detail = row.get("detail")
    if detail is not None and not isinstance(detail, str):
        detail = orjson.dumps(detail, option=orjson.OPT_SORT_KEYS).decode()
    values = (
        row["id"],
        row.get("run_id", fields.get("run_id")),
        row.get("tenant_id", fields["tenant_id"]),
        row.get("kind"),
        row.get("status"),
        detail,
        row.get("created_at", fields["at"]),
        bool(row.get("is_synthetic")),
        row.get("synthetic_scenario_id"),
        seq,
    )
    return statement, values
