"""Switches in a process's environment leave out a part: the coordinator, or the audit of rollbacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.governed import intact, journal
from tests.participants import acks, steps, transactions

SWITCHED = """
import asyncio, sys
from spine import Refused, Spine

class Pay:
    name, after, timeout_s, attempts = "pay", (), 5, 1
    async def forward(self, effect):
        print("forward")
        raise Refused("NO", "not today")
    async def rollback(self, effect):
        print("rollback")

async def main():
    async with Spine(sys.argv[1], domains=[Pay()]) as spine:
        try:
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        except Exception as error:
            print(type(error).__name__, error.code)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("switch", "said", "found"),
    [
        ("RAC_ROLLBACK_AUDIT_ENABLED", ["forward", "rollback", "TransactionFailed NO"], ["FAILED", "FAILED"]),
        ("TRANSACTION_COORDINATOR_ENABLED", ["TransactionFailed COORDINATOR_DISABLED"], []),
        ("NONE", ["forward", "rollback", "TransactionFailed NO"], ["FAILED", "ROLLED_BACK", "FAILED"]),
    ],
)
def test_a_process_may_be_told_to_leave_out_a_part(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, switch: str, said: list[str], found: list[str]
) -> None:
    """Without the rollback audit nothing else changes; without the coordinator a completion is refused, recorded."""
    monkeypatch.setenv(switch, "false")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SWITCHED, sqlite_url],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout.splitlines() == said
    assert [status for _, status in acks(sqlite_url)] == found
    if switch == "TRANSACTION_COORDINATOR_ENABLED":
        assert [body["code"] for body in journal(sqlite_url, "tx.refused")] == ["COORDINATOR_DISABLED"]
        assert transactions(sqlite_url) == []
    else:
        assert steps(sqlite_url) == {"pay": "ROLLED_BACK"}
    intact(sqlite_url)
