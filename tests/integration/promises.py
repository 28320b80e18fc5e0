"""What tests of the runtime audit contract share: runs with promises, domains' reports, and the verdicts on record."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from spine import Settings, Spine
from spine.governance.contract import FINALIZE
from spine.kernel.clock import VirtualClock
from tests.governed import clock, journal, query, running

MAIL = ("mail", "send", 5.0)
SOON = (*FINALIZE, 5.0)
HOUR_US = 3_600_000_000


def make(url: str, moments: VirtualClock, **more: Any) -> Spine:
    return Spine(url, settings=Settings(clock=moments), **more)


async def start(spine: Spine, *expectations: tuple[str, str, float], run_id: str = "run-1") -> None:
    assert (await spine.start_run(run_id, tenant_id="acme", expectations=expectations)).allowed


async def report(spine: Spine, status: str = "SUCCESS", *, run_id: str = "run-1", **more: Any) -> None:
    facts = {"tenant_id": "acme", "domain": "mail", "action": "send", "status": status} | more
    await spine.acknowledge(run_id, **facts)


def table(url: str) -> list[tuple[Any, ...]]:
    return query(url, "SELECT run_id, overall FROM contracts ORDER BY run_id")


def verdicts(url: str) -> list[dict[str, Any]]:
    return journal(url, "contract.reconciled")


def named(findings: list[dict[str, Any]]) -> list[str]:
    return [f"{finding['domain']}/{finding['action']}" for finding in findings]


@asynccontextmanager
async def overtaken(url: str, *expectations: tuple[str, str, float]) -> AsyncIterator[tuple[Spine, Spine]]:
    """Two Spines: once the first has read the contract, whose promises are overdue, the second judges it before it."""
    moments = clock()
    slow, fast = make(url, moments), make(url, moments)
    async with running(slow, fast):
        await start(slow, *expectations)
        await moments.advance(6)
        reader: Any = slow._system.reader
        read = reader.contract_rows

        async def slowly(run_id: str) -> Any:
            reader.contract_rows = read
            rows = await read(run_id)
            await fast.reconcile(run_id)
            return rows

        reader.contract_rows = slowly
        yield slow, fast
