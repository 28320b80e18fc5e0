"""The operator's switches: bypass, degrade, halt and restore. Each is journaled before it acts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from spine.cli.reading import reading
from spine.cli.render import print_json, print_lines
from spine.cli.support import AsJson, Database, database_url, guarded, quiet_logs
from spine.kernel.printable import printable

if TYPE_CHECKING:
    from spine.governance.authority import GovernanceState
    from spine.runtime import Spine

T = TypeVar("T")
Reason = Annotated[str, typer.Option("--reason", help="Why; it is recorded.")]
Actor = Annotated[str, typer.Option("--actor", help="Who; it is recorded.")]


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (bypass, degrade, halt, restore):
        app.command()(guarded(command))


def bypass(
    reason: Reason,
    actor: Actor,
    for_s: Annotated[int, typer.Option("--for-s", min=1, max=14_400, help="Seconds until it restores itself.")] = 3_600,
    db: Database = None,
    as_json: AsJson = False,
) -> int:
    """Stop governing for a while: operations run whatever the rules say, and every one is tagged."""
    return _switch(db, as_json, lambda spine: spine.bypass(reason=reason, actor=actor, for_s=for_s))


def degrade(reason: Reason, actor: Actor, db: Database = None, as_json: AsJson = False) -> int:
    """Refuse new runs; those that are open complete, flagged."""
    return _switch(db, as_json, lambda spine: spine.degrade(reason=reason, actor=actor))


def halt(reason: Reason, actor: Actor, db: Database = None, as_json: AsJson = False) -> int:
    """Let nothing new run."""
    return _switch(db, as_json, lambda spine: spine.halt(reason=reason, actor=actor))


def restore(reason: Reason, actor: Actor, db: Database = None, as_json: AsJson = False) -> int:
    """Govern again; after a bypass, tell what would have been denied."""
    return _switch(db, as_json, lambda spine: spine.restore(reason=reason, actor=actor))


def _switch(db: str | None, as_json: bool, act: Callable[[Spine], Awaitable[GovernanceState]]) -> int:
    import anyio

    state = anyio.run(partial(act_on, database_url(db), act))
    if as_json:
        print_json(state.to_dict())
        return 0
    told = state.to_dict()
    by = f"by {printable(told['actor'])}: {printable(told['reason'])}"
    lines = [
        ("good" if told["state"] == "active" else "warn", f"authority {told['state']}, epoch {told['epoch']}, {by}")
    ]
    for item in told["would_have_denied"]:
        what = f"{printable(item.get('operation'))} in run {printable(item.get('run_id'))}"
        because = f"{printable(item.get('code'))}: {printable(item.get('reason'))}"
        lines.append(("warn", f"  would have been denied: {what}: {because}"))
    print_lines(lines)
    return 0


async def act_on(url: str, act: Callable[[Spine], Awaitable[T]]) -> T:
    """Act through a Spine of this command's own on a database that exists."""
    # A switch on a database that nobody uses is a mistyped URL: reading first refuses it instead of creating it.
    async with reading(url) as reader:
        await reader.head()
    from spine.runtime import Spine

    quiet_logs()
    async with Spine(url) as spine:
        return await act(spine)
