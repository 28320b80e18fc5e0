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


FLIPPED = """
import asyncio, os, sys
from actors import recovery, takeover
from spine import Refused, Spine

recovery.LEASE_S = takeover.TICK_S = 0.2
dies, refuses = "DIES" in os.environ, "REFUSES" in os.environ

class Hotel:
    name, after, timeout_s, attempts = "hotel", (), 5, 3
    async def forward(self, effect):
        return {"id": "h1"}
    async def rollback(self, effect):
        pass

class Pay(Hotel):
    name, after = "pay", ("hotel",)
    async def forward(self, effect):
        if dies:
            os._exit(9)
        if refuses:
            raise Refused("NO", "not today")
        return {"id": "p1"}

async def main():
    async with Spine(sys.argv[1], domains=[Hotel(), Pay()]) as spine:
        if dies:
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        while await spine._system.reader.unended():
            await asyncio.sleep(0.02)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("refuses", "audited", "found"),
    [
        (False, "true", ["hotel SUCCESS", "pay SUCCESS"]),
        (False, "false", ["hotel SUCCESS", "pay SUCCESS"]),
        (True, "true", ["hotel SUCCESS", "pay FAILED", "pay ROLLED_BACK", "hotel ROLLED_BACK"]),
        (True, "false", ["pay FAILED"]),
    ],
    ids=["commits, audited", "commits", "rolled back, audited", "rolled back"],
)
def test_a_transaction_keeps_the_audit_that_it_began_with(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, refuses: bool, audited: str, found: list[str]
) -> None:
    """Its process dies and the next one is switched otherwise: each step is acknowledged once, as was begun."""
    if refuses:
        monkeypatch.setenv("REFUSES", "1")
    for flag, dies in ((audited, "1"), ({"true": "false", "false": "true"}[audited], "")):
        monkeypatch.setenv("RAC_ROLLBACK_AUDIT_ENABLED", flag)
        if dies:
            monkeypatch.setenv("DIES", dies)
        else:
            monkeypatch.delenv("DIES")
        command = [sys.executable, "-W", "error", "-c", FLIPPED, sqlite_url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == (9 if dies else 0), done.stderr
    assert [" ".join(ack) for ack in acks(sqlite_url, "hotel", "pay")] == found
    intact(sqlite_url)
