"""The commands that ask about runs: why and runs. They read, and never create, a database."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spine.cli.reading import reading
from spine.cli.render import JsonItems, print_json, print_lines, print_table
from spine.cli.support import AsJson, CommandError, Database, complain, database_url, guarded
from spine.kernel.printable import printable

if TYPE_CHECKING:
    from spine.journal.reader import JournalReader
    from spine.journal.rows import RunRow

_AMBIGUOUS_SHOWN = 10
_PAGE = 200


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (why, runs):
        app.command()(guarded(command))


def why(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or the beginning of it.")],
    db: Database = None,
    as_json: AsJson = False,
) -> int:
    """Say why a run ended as it did.

    Exit codes: 0 succeeded, 3 denied, 4 failed, rolled back or parked, 5 pending, 6 not found, 7 evidence broken.
    """
    import anyio

    from spine.explain import EXIT_EVIDENCE_BROKEN, EXIT_NOT_FOUND, explain

    run_id, rows, intact = anyio.run(partial(_evidence, database_url(db), run))
    if run_id is None:
        complain(f"no run {run!r} in this database: spine runs lists them")
        return EXIT_NOT_FOUND
    if not rows:
        complain(f"run {run_id!r} is listed, but its journal rows are gone: run spine verify")
        return EXIT_EVIDENCE_BROKEN
    answer = explain(rows, now_us=time.time_ns() // 1_000, intact=intact, run_id=run_id)
    if as_json:
        print_json(answer.to_dict())
    else:
        print_lines(answer.lines())
    return answer.exit_code


def runs(
    db: Database = None,
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=0, help="Show at most so many; 0 shows all.")] = 0,
    verdict: Annotated[str | None, typer.Option(help="Show only runs with this verdict, such as denied.")] = None,
) -> int:
    """List the runs with their verdicts, the latest first."""
    import anyio

    from spine.explain import EXIT_CODES

    if verdict is not None and verdict not in EXIT_CODES:
        raise CommandError(f"--verdict {verdict!r} is none of {', '.join(EXIT_CODES)}")
    anyio.run(partial(list_runs, database_url(db), as_json=as_json, limit=limit, only=verdict))
    return 0


async def _evidence(url: str, run: str) -> tuple[str | None, list[Any], bool | None]:
    """Find the one run that ``run`` names or begins, its rows, and whether their hashes hold."""
    async with reading(url) as reader:
        rows = await reader.run_rows(run)
        if not rows and await reader.run(run) is None:
            ids = await reader.run_ids_like(run, _AMBIGUOUS_SHOWN + 1)
            if not ids:
                return None, [], None
            if len(ids) > 1:
                more = ", ..." if len(ids) > _AMBIGUOUS_SHOWN else ""
                raise CommandError(f"{run!r} begins several runs: {', '.join(ids[:_AMBIGUOUS_SHOWN])}{more}")
            run = ids[0]
            rows = await reader.run_rows(run)
        return run, list(rows), await reader.run_evidence(run, rows) if rows else None


async def list_runs(url: str, *, as_json: bool = False, limit: int = 0, only: str | None = None) -> None:
    """Print the runs, the latest first; ``limit`` 0 shows all, ``only`` those with one verdict."""
    async with reading(url) as reader:
        items = JsonItems()
        first = True
        async for page in _pages(reader, limit, only):
            if as_json:
                items.add(page)
                continue
            print_table(_HEADERS, [_row(item) for item in page], header=first)
            first = False
        if as_json:
            items.end()
        elif first:
            print("no runs")


_HEADERS = ("run", "tenant", "verdict", "status", "contract", "operations", "denied", "failed", "started")


def _row(item: dict[str, Any]) -> tuple[str, list[str]]:
    from spine.explain.text import verdict_style

    started = item["started_at"]
    at = "unknown" if started is None else time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(started / 1_000_000))
    cells = [item["run_id"], item["tenant_id"], item["verdict"].replace("_", " "), item["run_status"] or "-"]
    cells.append(item["contract"] or "-")
    counts = [str(item[name]) for name in ("operations", "denied", "failed_operations")]
    return verdict_style(item["verdict"]), [*(printable(cell) for cell in cells), *counts, at]


async def _pages(reader: JournalReader, limit: int, only: str | None) -> AsyncIterator[list[dict[str, Any]]]:
    """The runs that are wanted, page by page, each with its verdict from its own journal rows."""
    before = None
    left = limit or None
    while left is None or left > 0:
        found = await reader.runs(_PAGE, before=before)
        if not found:
            return
        before = found[-1].started_seq
        page = [item for item in [await _item(reader, run) for run in found] if only in (None, item["verdict"])]
        if left is not None:
            page = page[:left]
            left -= len(page)
        if page:
            yield page


async def _item(reader: JournalReader, run: RunRow) -> dict[str, Any]:
    from spine.explain import kept, totals, verdict

    rows = await reader.run_rows(run.run_id)
    counted = totals(rows)
    return {
        "run_id": run.run_id,
        "tenant_id": run.tenant_id,
        "agent_id": run.agent_id,
        "verdict": verdict(rows),
        "run_status": run.run_status,
        "contract": kept(rows, now_us=time.time_ns() // 1_000),
        "started_at": run.started_at,
        "completed_at": run.completed_at,
        "operations": counted.operations,
        "denied": counted.denied,
        "failed_operations": counted.failed_operations,
    }
