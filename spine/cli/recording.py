"""The commands that make a journal: demo and replay."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from spine.cli.reading import reading
from spine.cli.render import print_json, print_lines, styled
from spine.cli.support import (
    EXIT_INTERRUPTED,
    AsJson,
    CommandError,
    Database,
    complain,
    database_url,
    guarded,
    quiet_logs,
    shown_url,
)

if TYPE_CHECKING:
    from spine.replay import Replay
    from spine.runtime import Spine

_EXIT_REFUSED = 1


def register(app: typer.Typer) -> None:
    """Add these commands to ``app``."""
    for command in (demo, replay):
        app.command()(guarded(command))


def demo(
    db: Annotated[
        str | None, typer.Option("--db", metavar="URL", help="The database (else a new temporary one).")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Make a small varied day on a temporary database, and ask why its most interesting run ended as it did."""
    from spine.cli.demo import run_demo

    return run_demo(db, as_json=as_json)


def replay(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Recorded runs as JSON lines; - reads standard input.")],
    db: Database = None,
    as_json: AsJson = False,
    app: Annotated[
        str | None, typer.Option(metavar="MODULE:ATTR", help="Use this Spine's rules and operations.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad line.")] = False,
) -> int:
    """Send recorded runs through a running Spine and print what the journal then holds of them.

    Operations it does not know answer as recorded. Replaying a file again doubles nothing.
    """
    import anyio

    from spine.replay import Replay

    began = time.monotonic()
    url = database_url(db)
    with _opened(file) as source:
        spine = _spine(app, url, given=db)
        replayed = Replay(spine, source, strict=strict, refuse=lambda line, why: complain(f"line {line}: {why}"))
        try:
            found, interrupted = anyio.run(partial(_replay, spine, replayed, replayed.prepare()))
        finally:
            replayed.close()
    totals = {
        **{name: found[name] for name in _TOTALS[:-3]},
        "rejected_lines": replayed.rejected_lines,
        "journal_rows": found["journal_rows"],
        "seconds": round(time.monotonic() - began, 3),
    }
    return _report(replayed, totals, interrupted=interrupted, strict=strict, as_json=as_json)


_TOTALS = (
    "runs", "operations", "allowed", "denied", "degraded", "failed_operations", "committed", "rolled_back", "parked",
    "events", "rejected_lines", "journal_rows", "seconds",
)  # fmt: skip


def _report(replayed: Replay, totals: dict[str, Any], *, interrupted: bool, strict: bool, as_json: bool) -> int:
    stream = sys.stderr if interrupted else sys.stdout
    if as_json:
        print_json(totals, stream)
    else:
        width = max(map(len, _TOTALS))
        print_lines([("", f"{name.replace('_', ' '):{width}}  {value}") for name, value in totals.items()], stream)
    if interrupted:
        complain("interrupted: what is counted above is in the journal; replay again to send the rest")
        return EXIT_INTERRUPTED
    if replayed.failure is not None:
        complain(f"stopped: {replayed.failure}")
        return _EXIT_REFUSED
    if replayed.unrecorded_lines:
        complain(f"{replayed.unrecorded_lines} lines are not recorded: replay again when the cause is gone")
    if refused := replayed.refused_completions:
        codes = ", ".join(f"{count} {code}" for code, count in refused.most_common())
        complain(f"completions refused, their runs stay open: {codes}: replay again when the cause is gone")
    unsent = replayed.unrecorded_lines or replayed.refused_completions or (strict and replayed.rejected_lines)
    return _EXIT_REFUSED if unsent else 0


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """The file, or a copy of standard input: it is read twice, first for the names of its operations."""
    if file != "-":
        with Path(file).open("rb") as source:
            if source.seekable():
                yield source
                return
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(source, copy)
                copy.seek(0)
                yield copy
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        yield copy


def _spine(app: str | None, url: str, *, given: str | None) -> Spine:
    if app is None:
        from spine.runtime import Spine

        quiet_logs()
        return Spine(url)
    from spine.cli.application import load_spine

    spine = load_spine(app, url if given else None)
    quiet_logs()
    if given and spine.url != url:
        raise CommandError(
            f"--app {app} keeps its journal at {shown_url(spine.url)}: leave --db out, or let it take Spine()'s default"
        )
    return spine


async def _replay(spine: Spine, replayed: Replay, lines: int) -> tuple[dict[str, int], bool]:
    """Run the Spine over the file; returns the totals from the journal and whether it was interrupted."""
    import anyio

    from spine.replay.driver import STOP_WITHIN_S

    interrupted = False

    async def listen() -> None:
        nonlocal interrupted
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                # Who asks twice does not want to wait for a call that hangs.
                replayed.stop(within_s=0.0 if interrupted else STOP_WITHIN_S)
                interrupted = True

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        with _progress(lines) as advance:
            replayed.progress = advance
            async with reading(spine.url) as reader:
                async with spine:
                    await replayed.drive(reader)
                found = await replayed.totals(reader)
        group.cancel_scope.cancel()
    return found.to_dict(), interrupted


@contextmanager
def _progress(lines: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, when that is a terminal."""
    if not styled(sys.stderr):
        yield lambda _lines: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replaying", total=lines)
        yield partial(bar.advance, task)
