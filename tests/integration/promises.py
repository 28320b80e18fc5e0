"""What tests of the runtime audit contract share: runs with promises, domains' reports, and the verdicts on record."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from spine import Settings, Spine
from spine.governance.contract import FINALIZE
from spine.kernel.clock import VirtualClock
from tests.governed import journal, query

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


def overtake(spine: Spine, work: Callable[[], Awaitable[Any]]) -> None:
    """Let ``work`` happen after this Spine has read a contract the next time, before it writes."""
    reader: Any = spine._system.reader
    read = reader.contract_rows

    async def slowly(run_id: str) -> Any:
        reader.contract_rows = read
        rows = await read(run_id)
        await work()
        return rows

    reader.contract_rows = slowly
