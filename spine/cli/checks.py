"""The commands that look at the whole database: ops, verify and health. They read, and never create it."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spine.cli.reading import reading
from spine.cli.render import print_json, print_lines, print_table
from spine.cli.support import AsJson, CommandError, Database, database_url, guarded
from spine.kernel.printable import printable

if TYPE_CHECKING:
    from spine.journal.rows import GovernanceRow


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (ops, verify, health):
        app.command()(guarded(command))


def ops(
    db: Database = None,
    as_json: AsJson = False,
    app: Annotated[str | None, typer.Option(metavar="MODULE:ATTR", help="List this Spine's operations too.")] = None,
) -> int:
    """List the operations that the journal has seen, with their counts and times."""
    import anyio

    from spine.cli.tally import Tally, tally

    registered = None
    if app is not None:
        from spine.cli.application import load_spine

        registered = frozenset(load_spine(app).operations)
    found = anyio.run(partial(tally, database_url(db)))
    items = [
        {**found.get(name, Tally()).to_dict(name), "registered": None if registered is None else name in registered}
        for name in sorted({*found, *(registered or ())})
    ]
    if as_json:
        print_json(items)
    elif items:
        shown = _HEADERS if registered is None else (*_HEADERS, "registered")
        print_table(shown, [_row(item) for item in items])
    else:
        print("no operations")
    return 0


_COUNTS = ("calls", "allowed", "denied", "degraded", "failed")
_HEADERS = ("operation", *_COUNTS, "p50 handler ms")


def _row(item: dict[str, Any]) -> tuple[str, list[str]]:
    p50 = item["p50_handle_ms"]
    known = [] if item["registered"] is None else ["yes" if item["registered"] else "no"]
    counts = [str(item[name]) for name in _COUNTS]
    style = "bad" if item["failed"] or item["denied"] else ""
    return style, [printable(item["operation"]), *counts, "unknown" if p50 is None else f"{p50:.2f}", *known]


def verify(
    db: Database = None,
    as_json: AsJson = False,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE:HASH", help="A head noted outside the database, which the chain must still contain."
        ),
    ] = None,
) -> int:
    """Check the journal's chain, its copied columns and everything derived from it.

    Exit codes: 0 sound, 1 broken, 2 cannot be verified.
    """
    from spine.journal.verify import verify as verify_journal

    report = verify_journal(database_url(db), checkpoints=[_checkpoint(text) for text in checkpoint or ()])
    size, digest = report.head
    if as_json:
        breaks = [{"stream": found.stream, "seq": found.seq, "kind": found.kind} for found in report.breaks]
        print_json({"ok": report.ok, "rows": report.rows, "breaks": breaks})
    elif report.ok:
        print_lines([("good", f"sound: {report.rows} rows"), ("dim", f"checkpoint {size}:{digest}")])
    else:
        lines = [("bad", f"broken in {len(report.breaks)} places; {report.rows} rows read")]
        lines += [("", f"  {printable(found.stream)} #{found.seq} {printable(found.kind)}") for found in report.breaks]
        print_lines(lines)
    return 0 if report.ok else 1


def _checkpoint(text: str) -> tuple[int, str]:
    size, _, digest = text.partition(":")
    if not size.isdecimal() or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"):
        raise CommandError(f"--checkpoint {text!r} is not SIZE:HASH as spine verify prints it")
    return int(size), digest.lower()


def health(db: Database = None, as_json: AsJson = False) -> int:
    """Show the state of the authority, the journal's head, and what is not finished."""
    import anyio

    found = anyio.run(partial(_health, database_url(db)))
    if as_json:
        print_json(found)
        return 0
    state = found["governance"]["state"]
    print_lines(
        [
            ("good" if state == "active" else "warn", f"authority {printable(state)}"),
            *(("", f"  {name}: {_or_none(value)}") for name, value in found["governance"].items() if name != "state"),
            *(("", f"{name}: {printable(value)}") for name, value in found.items() if name != "governance"),
        ]
    )
    return 0


def _or_none(value: Any) -> str:
    return "-" if value in (None, "") else printable(value)


def _binding(row: GovernanceRow, now_us: int) -> str:
    """The state that binds decisions now: an expired bypass does not, though nobody has journaled its end yet."""
    from spine.governance.authority import GovernanceMode, GovernanceState

    if row.state != GovernanceMode.BYPASSED:
        return row.state
    return GovernanceState(GovernanceMode.BYPASSED, expires_at=row.expires_at).effective(now_us).mode.value


async def _health(url: str) -> dict[str, Any]:
    async with reading(url) as reader:
        head = await reader.head()
        state = await reader.governance()
        counts = await reader.counts()
        oldest = await reader.pending_events(1)
    return {
        "governance": {
            "state": _binding(state, time.time_ns() // 1_000),
            "epoch": state.epoch,
            "reason": state.reason,
            "actor": state.actor,
            "since_at": state.since_at,
            "expires_at": state.expires_at,
        },
        "head": head.hash.hex(),
        **asdict(counts),
        "oldest_pending_event_at": oldest[0]["at"] if oldest else None,
    }
