"""The commands for parked transactions: which rollbacks wait for an operator, and what the operator does with them."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spine.cli.operate import Actor, Reason, act_on
from spine.cli.reading import reading
from spine.cli.render import print_json, print_lines, print_table
from spine.cli.support import AsJson, CommandError, Database, complain, database_url, guarded
from spine.kernel.printable import printable

if TYPE_CHECKING:
    from spine.runtime import Spine

_HEADERS = ("transaction", "run", "tenant", "domain", "parked", "error")
_SHOWN = 1_000
_AMBIGUOUS_SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (parked, resolve):
        app.command()(guarded(command))


def parked(db: Database = None, as_json: AsJson = False) -> int:
    """List the rollbacks that failed and wait for an operator."""
    import anyio

    items = anyio.run(partial(_parked, database_url(db)))
    if len(items) > _SHOWN:
        items = items[:_SHOWN]
        complain(f"more than {_SHOWN:,} rollbacks are parked: these are the oldest")
    if as_json:
        print_json(items)
    elif items:
        print_table(_HEADERS, [("bad", _row(item)) for item in items])
    else:
        print("nothing is parked")
    return 0


async def _parked(url: str) -> list[dict[str, Any]]:
    async with reading(url) as reader:
        rows = await reader.parked(limit=_SHOWN + 1)
        return [asdict(row) | {"at": (await reader.body_at(row.seq))["at"]} for row in rows]


def _row(item: dict[str, Any]) -> list[str]:
    at = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(item["at"] / 1_000_000))
    named = [printable(item[name]) for name in ("tx_id", "run_id", "tenant_id", "domain")]
    return [*named, at, printable(item["error"])]


def resolve(
    transaction: Annotated[str, typer.Argument(metavar="TX", help="The transaction's id, or the beginning of it.")],
    reason: Reason,
    actor: Actor,
    evidence: Annotated[
        str | None, typer.Option("--evidence", help="What shows that it was undone by hand; it is recorded.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Have its rollbacks tried again instead.")] = False,
    db: Database = None,
    as_json: AsJson = False,
) -> int:
    """End a parked transaction that was undone by hand, or have its rollbacks tried again."""
    import anyio

    if retry is (evidence is not None):
        raise CommandError("say either --evidence WHAT, if it was undone by hand, or --retry")
    url = database_url(db)
    tx_id = anyio.run(partial(_one, url, transaction))

    async def act(spine: Spine) -> dict[str, Any]:
        if evidence is None:
            return await spine.retry(tx_id, reason=reason, actor=actor)
        return await spine.resolve(tx_id, evidence=evidence, reason=reason, actor=actor)

    told = anyio.run(partial(act_on, url, act))
    if as_json:
        print_json(told)
        return 0
    lines = [("good", f"transaction {printable(told['tx_id'])} of run {printable(told['run_id'])} is {told['state']}")]
    if retry:
        lines.append(("dim", "a running application that declares its domains goes on with it"))
    print_lines(lines)
    return 0


async def _one(url: str, transaction: str) -> str:
    """The one parked transaction that ``transaction`` names or begins."""
    if not transaction:
        raise CommandError("the transaction's id is empty: spine parked lists those that wait")
    async with reading(url) as reader:
        count, ids = await reader.parked_like(transaction, _AMBIGUOUS_SHOWN)
        other = await reader.transaction_like(transaction)
    if count == 1:
        return ids[0]
    if count > 1:
        more = f" and {count - len(ids)} more" if count > len(ids) else ""
        raise CommandError(f"{transaction!r} begins several parked transactions: {', '.join(ids)}{more}")
    if other is None:
        raise CommandError(f"there is no transaction {transaction!r}: spine parked lists those that wait")
    raise CommandError(
        f"transaction {other.tx_id} of run {other.run_id!r} is {other.state}, not PARKED: see spine why "
        f"{other.run_id}; spine parked lists those that wait"
    )
