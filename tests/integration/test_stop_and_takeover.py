"""A Spine that stops leaves what it gives up to the next one: it does not take it over itself on its way out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spine.journal.reader import JournalReader
from spine.settings import Retry
from tests.governed import intact, journal, running, until
from tests.participants import Held, Remote, World, complete, over, raises, refuses, transactions

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_a_stopping_spine_does_not_claim_what_it_has_just_given_up(
    sqlite_url: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look for stranded transactions is under way when the stop begins, and finds one that nobody drives any more."""
    looking, look_on = asyncio.Event(), asyncio.Event()
    stranded = JournalReader.stranded

    async def slowly(self: JournalReader, *args: Any) -> Any:
        if world.told("rollback"):
            looking.set()
            await look_on.wait()
        return await stranded(self, *args)

    monkeypatch.setattr(JournalReader, "stranded", slowly)
    stubborn = Remote(world, rollback=raises(OSError("away")))
    no = Remote(world, "no", after=["pay"], forward=refuses())
    retry = Retry(attempts=100, first_s=0.02, most_s=0.02)
    spine = over(sqlite_url, stubborn, no, drain_s=0.05, retry=retry)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await looking.wait()
        attempts = spine._system.supervisor._children["coordinator"].actor._attempts  # type: ignore[union-attr]
        stopping = asyncio.create_task(spine.stop())
        await until(lambda: not attempts._sagas)
        look_on.set()
        await stopping
        await asyncio.wait([caller])
        assert caller.cancelled() or caller.exception() is not None
    assert transactions(sqlite_url) == ["COMPENSATING"]
    assert journal(sqlite_url, "tx.claimed") == []
    intact(sqlite_url)


async def test_a_rollback_under_way_may_end_while_its_spine_stops(sqlite_url: str, world: World) -> None:
    """A stop gives up what is still to be done, not what is being undone: no next start has to ask again."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=refuses(), rollback=held), drain_s=0.1)
    async with running(spine):
        caller = asyncio.create_task(complete(spine))
        await held.reached.wait()
        attempts = spine._system.supervisor._children["coordinator"].actor._attempts  # type: ignore[union-attr]
        stopping = asyncio.create_task(spine.stop())
        await until(lambda: attempts._stopping)
        held.let_go.set()
        await stopping
        await asyncio.wait([caller])
        assert caller.cancelled() or caller.exception() is not None
    assert transactions(sqlite_url) == ["ABORTED"]
    assert world.told() == ["forward pay", "rollback pay"]
    intact(sqlite_url)
