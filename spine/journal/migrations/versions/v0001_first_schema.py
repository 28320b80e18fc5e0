"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SMALL = {"sqlite_with_rowid": False}


def _text(name: str, *, key: bool = False, null: bool = False) -> sa.Column[str]:
    kind = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    return sa.Column(name, kind, primary_key=key, nullable=null)


def _int(name: str, *, key: bool = False, null: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, primary_key=key, nullable=null, autoincrement=False)


def _hash(name: str) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary(32), nullable=False)


def _index(name: str, table: str, columns: list[str], where: str | None = None) -> None:
    condition = None if where is None else sa.text(where)
    op.create_index(name, table, columns, sqlite_where=condition, postgresql_where=condition)


def upgrade() -> None:
    """Create every table of version 1."""
    _journal()
    _runs()
    _transactions()
    for name in ("incidents", "policy_evaluations", "traces", "lessons"):
        op.create_table(
            name,
            _text("id", key=True),
            _text("run_id", null=True),
            _text("tenant_id"),
            _text("kind", null=True),
            _text("status", null=True),
            _text("detail", null=True),
            _int("created_at"),
            sa.Column("is_synthetic", sa.Boolean, nullable=False),
            _text("synthetic_scenario_id", null=True),
            _int("seq"),
        )
        _index(f"{name}_run", name, ["run_id"])


def _journal() -> None:
    op.create_table("spine_meta", _text("key", key=True), _text("value"), **SMALL)
    op.create_table(
        "journal",
        _text("stream", key=True),
        _int("seq", key=True),
        _hash("prev"),
        _hash("hash"),
        _text("body"),
        _text("kind"),
        _text("unit"),
        _text("run_id", null=True),
        _text("tenant_id", null=True),
        _text("ref", null=True),
    )
    _index("journal_run", "journal", ["run_id", "seq"], "run_id IS NOT NULL")
    _index("journal_governance", "journal", ["seq"], "kind = 'governance.changed'")
    op.create_table("journal_head", _text("stream", key=True), _int("size"), _hash("hash"), **SMALL)
    op.create_table(
        "governance",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        _text("state"),
        _int("epoch"),
        _text("reason", null=True),
        _text("actor", null=True),
        _int("since_at"),
        _int("expires_at", null=True),
        _int("seq"),
        **SMALL,
    )
    op.create_table(
        "instances",
        _text("instance", key=True),
        _int("lease_until_at"),
        _int("started_at", null=True),
        _text("process", null=True),
        **SMALL,
    )


def _runs() -> None:
    op.create_table(
        "runs",
        _text("run_id", key=True),
        _text("tenant_id"),
        _text("agent_id", null=True),
        sa.Column("implicit", sa.Boolean, nullable=False),
        _text("state"),
        _text("run_status", null=True),
        _int("started_seq"),
        _int("started_at"),
        _int("completed_seq", null=True),
        _int("completed_at", null=True),
        _text("tx_id", null=True),
        **SMALL,
    )
    _index("runs_started", "runs", ["started_seq"])
    op.create_table(
        "run_expectations",
        _text("run_id", key=True),
        _text("domain", key=True),
        _text("action", key=True),
        _int("deadline_at"),
        **SMALL,
    )
    op.create_table(
        "contracts",
        _text("run_id", key=True),
        _text("overall"),
        _int("due_at", null=True),
        _int("seq"),
        **SMALL,
    )
    _index("contracts_due", "contracts", ["due_at", "run_id"], "due_at IS NOT NULL")
    op.create_table(
        "acknowledgements",
        _int("seq", key=True),
        _text("run_id"),
        _text("tx_id", null=True),
        _text("domain"),
        _text("action"),
        _text("status"),
        _text("result_id", null=True),
        _text("error", null=True),
        **SMALL,
    )
    _index("acknowledgements_run", "acknowledgements", ["run_id"])
    op.create_table(
        "open_decisions",
        _text("decision_id", key=True),
        _text("instance"),
        _int("seq"),
        _text("run_id", null=True),
        _text("tenant_id"),
        _text("operation"),
        _text("key", null=True),
        **SMALL,
    )
    op.create_table(
        "idempotency",
        _text("tenant_id", key=True),
        _text("operation", key=True),
        _text("key", key=True),
        _text("digest"),
        _text("decision_id"),
        _text("state"),
        _int("seq_decision"),
        _int("seq_outcome", null=True),
        **SMALL,
    )


def _transactions() -> None:
    op.create_table(
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
        sa.UniqueConstraint("run_id", "completion_key", "attempt", name="transactions_attempt"),
        **SMALL,
    )
    _index("transactions_unended", "transactions", ["state"], "state IN ('COMPENSATING', 'EXECUTING', 'PARKED')")
    op.create_table(
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
        **SMALL,
    )
    _index("steps_parked", "steps", ["domain"], "state = 'PARKED'")
    op.create_table(
        "outbox",
        _text("event_id", key=True),
        _text("tx_id", null=True),
        _text("run_id", null=True),
        _int("n"),
        _text("type"),
        _text("state"),
        _int("seq"),
        **SMALL,
    )
    _index("outbox_pending", "outbox", ["seq"], "state = 'pending'")
