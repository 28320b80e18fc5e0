"""The tables of version 1: the journal and its head, the projections of it, and the leases of the processes.

Every projection is written in the commit of the rows it follows from, and can be built again from them.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.sql.schema import SchemaItem
from sqlalchemy.types import TypeEngine

from spine.governance.transactions import StepState, TxState
from spine.journal.statements import words

SCHEMA_VERSION: Final = 1

# What the partial indexes hold.
_UNENDED: Final = f"state IN ({words(TxState.unended())})"
_PARKED: Final = f"state = '{StepState.PARKED}'"

metadata = MetaData()


def _words() -> TypeEngine[str]:
    # Byte order on both databases: prefixes are ranges, and verify merges both in one order.
    return Text().with_variant(Text(collation="C"), "postgresql")


def _text(name: str, *, key: bool = False, null: bool = False) -> Column[str]:
    return Column(name, _words(), primary_key=key, nullable=null)


def _int(name: str, *, key: bool = False, null: bool = False) -> Column[int]:
    return Column(name, BigInteger, primary_key=key, nullable=null, autoincrement=False)


def _small(name: str, *items: SchemaItem) -> Table:
    """A table whose rows are short: in SQLite one tree, without a separate row id."""
    return Table(name, metadata, *items, sqlite_with_rowid=False)


spine_meta = _small("spine_meta", _text("key", key=True), _text("value"))

journal = Table(
    "journal",
    metadata,
    _text("stream", key=True),
    _int("seq", key=True),
    Column("prev", LargeBinary(32), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    _text("body"),
    _text("kind"),
    _text("unit"),
    _text("run_id", null=True),
    _text("tenant_id", null=True),
    _text("ref", null=True),
    Index(
        "journal_run",
        "run_id",
        "seq",
        sqlite_where=text("run_id IS NOT NULL"),
        postgresql_where=text("run_id IS NOT NULL"),
    ),
    Index(
        "journal_governance",
        "seq",
        sqlite_where=text("kind = 'governance.changed'"),
        postgresql_where=text("kind = 'governance.changed'"),
    ),
)

journal_head = _small(
    "journal_head",
    _text("stream", key=True),
    _int("size"),
    Column("hash", LargeBinary(32), nullable=False),
)

governance = _small(
    "governance",
    Column("id", Integer, primary_key=True, autoincrement=False),
    _text("state"),
    _int("epoch"),
    _text("reason", null=True),
    _text("actor", null=True),
    _int("since_at"),
    _int("expires_at", null=True),
    _int("seq"),
)

runs = _small(
    "runs",
    _text("run_id", key=True),
    _text("tenant_id"),
    _text("agent_id", null=True),
    Column("implicit", Boolean, nullable=False),
    _text("state"),
    _text("run_status", null=True),
    _int("started_seq"),
    _int("started_at"),
    _int("completed_seq", null=True),
    _int("completed_at", null=True),
    _text("tx_id", null=True),
    Index("runs_started", "started_seq"),
)

run_expectations = _small(
    "run_expectations",
    _text("run_id", key=True),
    _text("domain", key=True),
    _text("action", key=True),
    _int("deadline_at"),
)

contracts = _small(
    "contracts",
    _text("run_id", key=True),
    _text("overall"),
    _int("due_at", null=True),
    _int("seq"),
    Index(
        "contracts_due",
        "due_at",
        "run_id",
        sqlite_where=text("due_at IS NOT NULL"),
        postgresql_where=text("due_at IS NOT NULL"),
    ),
)

acknowledgements = _small(
    "acknowledgements",
    _int("seq", key=True),
    _text("run_id"),
    _text("tx_id", null=True),
    _text("domain"),
    _text("action"),
    _text("status"),
    _text("result_id", null=True),
    _text("error", null=True),
    Index("acknowledgements_run", "run_id"),
)

open_decisions = _small(
    "open_decisions",
    _text("decision_id", key=True),
    _text("instance"),
    _int("seq"),
    _text("run_id", null=True),
    _text("tenant_id"),
    _text("operation"),
    _text("key", null=True),
)

idempotency = _small(
    "idempotency",
    _text("tenant_id", key=True),
    _text("operation", key=True),
    _text("key", key=True),
    _text("digest"),
    _text("decision_id"),
    _text("state"),
    _int("seq_decision"),
    _int("seq_outcome", null=True),
)

transactions = _small(
    "transactions",
    _text("tx_id", key=True),
    _text("run_id"),
    _text("tenant_id"),
    _text("completion_key"),
    _text("digest"),
    _int("attempt"),
    _text("previous", null=True),
    _text("state"),
    _text("phase", null=True),
    _int("epoch"),
    _text("instance"),
    _int("seq_begun"),
    _int("seq_ended", null=True),
    UniqueConstraint("run_id", "completion_key", "attempt", name="transactions_attempt"),
    Index(
        "transactions_unended",
        "state",
        sqlite_where=text(_UNENDED),
        postgresql_where=text(_UNENDED),
    ),
)

steps = _small(
    "steps",
    _text("tx_id", key=True),
    _int("n", key=True),
    _text("domain"),
    _text("class"),
    _text("state"),
    _text("effect_id", null=True),
    _text("result_id", null=True),
    _text("error", null=True),
    _int("seq"),
    Index(
        "steps_parked",
        "domain",
        sqlite_where=text(_PARKED),
        postgresql_where=text(_PARKED),
    ),
)

outbox = _small(
    "outbox",
    _text("event_id", key=True),
    _text("tx_id", null=True),
    _text("run_id", null=True),
    _int("n"),
    _text("type"),
    _text("state"),
    _int("seq"),
    Index(
        "outbox_pending",
        "seq",
        sqlite_where=text("state = 'pending'"),
        postgresql_where=text("state = 'pending'"),
    ),
)


def _domain(name: str) -> Table:
    return Table(
        name,
        metadata,
        _text("id", key=True),
        _text("run_id", null=True),
        _text("tenant_id"),
        _text("kind", null=True),
        _text("status", null=True),
        _text("detail", null=True),
        _int("created_at"),
        Column("is_synthetic", Boolean, nullable=False),
        _text("synthetic_scenario_id", null=True),
        _int("seq"),
        Index(f"{name}_run", "run_id"),
    )


incidents = _domain("incidents")
policy_evaluations = _domain("policy_evaluations")
traces = _domain("traces")
lessons = _domain("lessons")

instances = _small(
    "instances",
    _text("instance", key=True),
    _int("lease_until_at"),
    _int("started_at", null=True),
    _text("process", null=True),
)

DOMAIN_TABLES: Final = (incidents, policy_evaluations, traces, lessons)
PROJECTIONS: Final = (
    governance,
    runs,
    run_expectations,
    contracts,
    acknowledgements,
    open_decisions,
    idempotency,
    transactions,
    steps,
    outbox,
    *DOMAIN_TABLES,
)

FIRST_GOVERNANCE: Final = {
    "id": 1,
    "state": "active",
    "epoch": 1,
    "reason": None,
    "actor": None,
    "since_at": 0,
    "expires_at": None,
    "seq": 0,
}
