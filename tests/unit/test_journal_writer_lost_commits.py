"""A commit whose answer is lost is looked up, and one that nobody waits for stands."""

from __future__ import annotations

import asyncio
import threading

import pytest

from spine.governance.units import Committed, StorageFailed, Unit
from spine.journal.faults import CommitUnknown
from spine.journal.session import Session
from spine.journal.verify import verify
from tests.unit.journal_kit import all_committed, sql, started, writing

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_cancelling_the_wait_does_not_undo_the_commit(journal_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on, commit = threading.Event(), threading.Event(), Session.commit

    def slow(session: Session) -> None:
        reached.set()
        assert go_on.wait(10)
        commit(session)

    async with writing(journal_url) as writer:
        monkeypatch.setattr(Session, "commit", slow)
        waiting = asyncio.ensure_future(writer.commit([Unit("u1", [started()])]))
        await asyncio.to_thread(reached.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        assert await writer.find_units(["u1"], 0) == {"u1": Committed(1, 1)}
        assert all_committed(await writer.commit([Unit("u2", [started("b")])]))
    assert verify(journal_url).ok


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_commit_is_looked_up(journal_url: str, monkeypatch: pytest.MonkeyPatch, applied: bool) -> None:
    commit, lost = Session.commit, [True]

    def losing(session: Session) -> None:
        if not lost:
            commit(session)
            return
        lost.clear()
        if applied:
            commit(session)
        raise CommitUnknown("the answer was lost")

    async with writing(journal_url) as writer:
        await writer.commit([Unit("u0", [started("zero")])])
        monkeypatch.setattr(Session, "commit", losing)
        outcomes = await writer.commit([Unit("u1", [started("a")]), Unit("u2", [started("b")])])
        if applied:
            assert outcomes == [Committed(2, 2), Committed(3, 3)]
        else:
            assert [type(outcome) for outcome in outcomes] == [StorageFailed, StorageFailed]
            assert not any(outcome.unknown for outcome in outcomes if isinstance(outcome, StorageFailed))
            assert await writer.find_units(["u1", "u2"], 0) == {}
        assert all_committed(await writer.commit([Unit("u3", [started("c")])]))
    assert verify(journal_url).ok


async def test_a_lost_commit_that_cannot_be_looked_up_is_unknown(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(session: Session) -> None:
        raise CommitUnknown("the answer was lost")

    def refusing(session: Session, *, create: bool) -> None:
        raise OSError("the network is gone")

    async with writing(journal_url) as writer:
        with monkeypatch.context() as broken:
            broken.setattr(Session, "commit", losing)
            broken.setattr(Session, "connect", refusing)
            (outcome,) = await writer.commit([Unit("u1", [started()])])
            assert isinstance(outcome, StorageFailed)
            assert outcome.unknown
            (outcome,) = await writer.commit([Unit("u2", [started()])])
            assert isinstance(outcome, StorageFailed)
            assert not outcome.unknown
        assert all_committed(await writer.commit([Unit("u3", [started()])]))


async def test_a_killed_connection_is_replaced(journal_postgresql_url: str) -> None:
    async with writing(journal_postgresql_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        sql(
            journal_postgresql_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query = 'COMMIT'",
        )
        first, second = await writer.commit([Unit("u2", [started("b")]), Unit("u3", [started("c")])])
        assert isinstance(first, StorageFailed)
        assert first == second
        assert not first.unknown
        assert await writer.commit([Unit("u4", [started("d")])]) == [Committed(2, 2)]
    assert verify(journal_postgresql_url).ok
