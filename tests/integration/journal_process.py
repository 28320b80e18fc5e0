"""A process that writes a journal, for the tests that kill it, starve it or set another one beside it."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import sys
from collections.abc import Callable

from spine.governance.units import Committed, StaleEpoch, StorageFailed, Unit
from spine.journal.reader import JournalReader
from spine.journal.verify import verify
from spine.journal.writer import JournalWriter
from spine.kernel.errors import JournalError
from tests.unit.journal_kit import decided, ended, started, switched, write


def say(*words: object) -> None:
    print(*words, flush=True)


async def load(url: str, name: str, batches: str) -> None:
    """Write batches of decisions and outcomes; say each unit once it is acknowledged; 0 batches go on for ever."""
    writer = JournalWriter(url, checkpoint_pages=50)
    await writer.open()
    say("ready")
    sys.stdin.readline()
    for batch in itertools.count() if batches == "0" else range(int(batches)):
        ids = [f"{name}-{batch}-{n}" for n in range(5)]
        units = [Unit(f"start-{name}-{batch}", [started(f"run-{name}-{batch}")])]
        units += [Unit(f"d-{one}", [decided(one, f"run-{name}-{batch}", instance=name)]) for one in ids]
        units += [Unit(f"e-{one}", [ended(one, f"run-{name}-{batch}", instance=name)]) for one in ids[:4]]
        outcomes = await writer.commit(units)
        for unit, outcome in zip(units, outcomes, strict=True):
            if isinstance(outcome, Committed):
                say(unit.id, outcome.first, outcome.last)
            else:
                say("lost", unit.id, outcome)
    await writer.close()


async def switch(url: str, times: str) -> None:
    """Switch the governance state again and again, as fast as others let it."""
    writer, reader = JournalWriter(url), JournalReader(url)
    await writer.open()
    say("ready")
    sys.stdin.readline()
    done = 0
    while done < int(times):
        epoch = (await reader.governance()).epoch
        unit = Unit(f"switch-{os.getpid()}-{done}-{epoch}", [switched("halted", epoch + 1)])
        (outcome,) = await writer.commit([unit])
        done += isinstance(outcome, Committed)
    await writer.close()
    await reader.close()


async def decide(url: str, name: str, times: str) -> None:
    """Decide under the epoch last heard of, and decide again when it was stale."""
    writer = JournalWriter(url)
    await writer.open()
    say("ready")
    sys.stdin.readline()
    epoch = 1
    for number in range(int(times)):
        while True:
            record = decided(f"{name}-{number}", None, epoch=epoch)
            (outcome,) = await writer.commit([Unit(f"{name}-{number}-{epoch}", [record], epoch=epoch)])
            if not isinstance(outcome, StaleEpoch):
                break
            epoch = outcome.epoch
    await writer.close()


async def full_disk(url: str) -> None:
    """Write until no file may grow any more; then until they may again."""
    writer = JournalWriter(url)
    await writer.open()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    acknowledged: list[str] = []
    refused: list[str] = []
    for number in range(2_000):
        (outcome,) = await writer.commit([Unit(f"u{number}", [decided(f"d{number}", params={"x": "y" * 5_000})])])
        if isinstance(outcome, StorageFailed) and not outcome.unknown:
            refused.append(f"u{number}")
        elif isinstance(outcome, Committed):
            acknowledged.append(f"u{number}")
        # The first refusal gives the log's space back to the database; then that is full too.
        if len(refused) == 4:
            break
    say("refused", len(refused))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    (after,) = await writer.commit([Unit("after", [decided("after")])])
    say("after", type(after).__name__)
    found = await writer.find_units([*acknowledged, *refused, "after"], 0)
    say("kept", len(acknowledged) > 50 and found.keys() == {*acknowledged, "after"})
    await writer.close()
    say("whole", verify(url).ok)


async def read_only(url: str) -> None:
    """Try to write, then read, as a user who may only read."""
    if os.getuid() == 0:
        os.setuid(65_534)
    try:
        await JournalWriter(url).open()
    except JournalError as error:
        say(type(error).__name__, error)
    reader = JournalReader(url)
    say("rows", (await reader.head()).size)
    await reader.close()
    say("whole", verify(url).ok)


def fork(url: str) -> None:
    """Open a writer, fork, and use it in the child; then give the child its own."""
    loop = asyncio.new_event_loop()
    writer = JournalWriter(url)
    loop.run_until_complete(writer.open())
    loop.run_until_complete(writer.commit([Unit("parent-1", [started("parent-1")])]))
    child = os.fork()
    if child == 0:
        os._exit(_in_child(lambda: asyncio.run(_forked(writer, url))))
    _, status = os.waitpid(child, 0)
    say("child", status)
    (outcome,) = loop.run_until_complete(writer.commit([Unit("parent-2", [started("parent-2")])]))
    say("parent", outcome)
    loop.run_until_complete(writer.close())
    loop.close()
    report = verify(url)
    say("whole", report.ok, report.rows)


def _in_child(work: Callable[[], None]) -> int:
    try:
        work()
    except BaseException as error:
        say("child failed", repr(error))
        return 1
    return 0


async def _forked(writer: JournalWriter, url: str) -> None:
    for attempt in (
        writer.commit([Unit("child-0", [started("child-0")])]),
        writer.find_units(["x"], 0),
        writer.release_lease(),
    ):
        try:
            await attempt
        except JournalError as error:
            say("refused", "fork" in str(error))
    await writer.close()
    try:
        say("own", (await write(url, [Unit("child-1", [started("child-1")])]))[0])
    except JournalError as error:
        say("own refused", "inherited connections" in str(error))


if __name__ == "__main__":
    tasks = {"load": load, "switch": switch, "decide": decide, "full_disk": full_disk, "read_only": read_only}
    name, *arguments = sys.argv[1:]
    if name == "fork":
        fork(*arguments)
    else:
        asyncio.run(tasks[name](*arguments))
