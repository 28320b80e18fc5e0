"""A user's table of bills, and LOCAL domains that take part in completing a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spine import RunFacts, Settings, Spine, Write
from tests.governed import Published, query, running

BILLS = "CREATE TABLE IF NOT EXISTS bills (id TEXT PRIMARY KEY, run_id TEXT NOT NULL, cents INTEGER NOT NULL)"
TABLES = ("incidents", "policy_evaluations", "traces")


class Local:
    """A user's domain; ``plan`` does what the test says."""

    def __init__(
        self, name: str, plan: Callable[[RunFacts], Any], *, after: Sequence[str] = (), action: str = ""
    ) -> None:
        self.name = name
        self.after = tuple(after)
        self.does = plan
        self.planned: list[RunFacts] = []
        if action:
            self.action = action

    def plan(self, run: RunFacts) -> Sequence[Write]:
        self.planned.append(run)
        found: Sequence[Write] = self.does(run)
        return found


def bill(run: RunFacts) -> list[Write]:
    return [
        Write(
            "INSERT INTO bills (id, run_id, cents) VALUES (:id, :run, :cents)",
            {"id": run.effect_id, "run": run.run_id, "cents": 5},
        )
    ]


def raises(error: BaseException) -> Callable[[RunFacts], Any]:
    def plan(run: RunFacts) -> list[Write]:
        raise error

    return plan


async def make(url: str, *domains: Local, publisher: Any = None, **settings: Any) -> Spine:
    """A Spine over a database that has the user's table."""
    spine = Spine(url, domains=domains, publisher=publisher or Published(), settings=Settings(**settings))
    async with running(spine):
        query(url, BILLS)
    return spine


def bills(url: str) -> list[tuple[Any, ...]]:
    return query(url, "SELECT run_id, cents FROM bills ORDER BY run_id, cents")


def rows_written(url: str) -> dict[str, int]:
    return {table: query(url, f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}
