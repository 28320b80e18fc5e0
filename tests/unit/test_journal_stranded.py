"""Which transactions are nobody's: those in flight whose process is dead, and never one that waits for an operator."""

from __future__ import annotations

import pytest

from spine.governance.transactions import TxState
from spine.governance.units import Unit
from tests.unit.journal_kit import all_committed, begun, reading, sql, started, writing

pytestmark = pytest.mark.anyio


async def test_only_what_is_in_flight_and_nobodys_is_stranded(journal_url: str) -> None:
    """Of a dead process, and of one's own; in flight are EXECUTING and COMPENSATING, parked is not."""
    owners = {f"{owner}-{state}": (owner, state) for owner in ("dead", "alive", "own") for state in TxState}
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        units = [
            Unit(tx, [started(tx), begun(tx, tx, instance=owner, domains=[])]) for tx, (owner, _) in owners.items()
        ]
        assert all_committed(await writer.commit(units))
        for tx, (_, state) in owners.items():
            sql(journal_url, f"UPDATE transactions SET state = '{state}' WHERE tx_id = ?", tx)
        for owner in ("alive", "own"):
            sql(journal_url, "INSERT INTO instances (instance, lease_until_at, started_at) VALUES (?, 2000, 0)", owner)
        found = [row.tx_id for row in await reader.stranded(1000, "own")]
        assert found == ["dead-EXECUTING", "dead-COMPENSATING", "own-EXECUTING", "own-COMPENSATING"]
        assert "alive-EXECUTING" in [row.tx_id for row in await reader.stranded(3000, "own")]
