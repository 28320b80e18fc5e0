"""What the database refuses becomes a storage failure, and the writer goes on when it can."""

from __future__ import annotations

from pathlib import Path

import pytest

from spine.governance.units import Committed, GuardFailed, Record, StorageFailed, Unit
from spine.journal.faults import StorageError
from spine.journal.session import Session
from spine.journal.verify import verify
from spine.kernel.errors import JournalUnavailable
from tests.unit.journal_kit import all_committed, day, sql, started, switched, write, writing
from tests.unit.journal_locks import Locked

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_a_lock_held_too_long_is_a_storage_failure_and_passes(journal_url: str) -> None:
    async with writing(journal_url, busy_timeout_ms=50) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        with Locked(journal_url):
            outcomes = await writer.commit([Unit(f"b{n}", [started(f"b{n}")]) for n in range(3)])
            assert all(isinstance(outcome, StorageFailed) for outcome in outcomes)
            assert "lock" in str(outcomes[0])
        assert await writer.commit([Unit("u2", [started("c")])]) == [Committed(2, 2)]
    assert verify(journal_url).ok


async def test_units_written_one_by_one_do_not_each_wait_for_a_broken_database(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_, begin = [], Session.begin

    def breaking(session: Session) -> None:
        begun_.append(session)
        if len(begun_) > 2:
            raise StorageError("the disk is gone")
        begin(session)

    async with writing(journal_url) as writer:
        await writer.commit([Unit("u0", [started("taken")])])
        monkeypatch.setattr(Session, "begin", breaking)
        units = [Unit("u1", [started("a")]), *(Unit(f"u{n}", [started("taken")]) for n in range(2, 9))]
        first, *rest = await writer.commit(units)
    assert first == Committed(2, 2)
    assert len(rest) == 7
    assert all(isinstance(outcome, StorageFailed) and not outcome.unknown for outcome in rest)
    assert len(begun_) == 3


async def test_a_full_database_refuses_and_goes_on_when_there_is_space(sqlite_url: str) -> None:
    async with writing(sqlite_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        connection = writer._core._session._connection
        limit = "PRAGMA max_page_count={}"
        pages = await writer._worker.call(lambda: connection.execute("PRAGMA page_count").fetchone()[0])
        await writer._worker.call(lambda: connection.execute(limit.format(pages)).fetchone())
        big = [Unit(f"big-{n}", [Record("run.denied", 1, {"x": "y" * 50_000})]) for n in range(2)]
        outcomes = await writer.commit(big)
        assert all(isinstance(outcome, StorageFailed) for outcome in outcomes)
        assert "full" in str(outcomes[0])
        # The next batch has a new connection, which knows nothing of the limit.
        assert await writer.commit(big) == [Committed(2, 2), Committed(3, 3)]
    assert verify(sqlite_url).ok


async def test_a_journal_that_went_back_is_not_continued(journal_url: str) -> None:
    async with writing(journal_url) as writer:
        assert all_committed(await writer.commit(day()))
        sql(journal_url, "UPDATE journal_head SET size = 1, hash = (SELECT hash FROM journal WHERE seq = 1)")
        (outcome,) = await writer.commit([Unit("u", [started("late")])])
        assert isinstance(outcome, StorageFailed)
        assert "went back" in outcome.error
    async with writing(journal_url) as writer:
        (outcome,) = await writer.commit([Unit("u", [started("late")])])
        assert isinstance(outcome, StorageFailed)
        assert "verify" in outcome.error


@pytest.mark.parametrize("table", ["journal_head", "governance"])
async def test_a_lost_head_or_governance_row_is_a_storage_failure(journal_url: str, table: str) -> None:
    async with writing(journal_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        sql(journal_url, f"DELETE FROM {table}")
        (outcome,) = await writer.commit([Unit("u2", [switched("halted", 2)])])
        assert isinstance(outcome, (StorageFailed, GuardFailed))
    with pytest.raises(JournalUnavailable, match="verify"):
        await write(journal_url, [Unit("u3", [started("b")])])


async def test_a_replaced_file_is_noticed(sqlite_url: str) -> None:
    path = Path(sqlite_url.partition("///")[2])
    moved = path.with_name("moved")
    async with writing(sqlite_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        path.rename(moved)
        (outcome,) = await writer.commit([Unit("u2", [started("b")])])
        assert isinstance(outcome, StorageFailed)
        assert not path.exists()
        path.write_bytes(b"")
        (outcome,) = await writer.commit([Unit("u2", [started("b")])])
        assert isinstance(outcome, StorageFailed)
        assert path.read_bytes() == b""
        moved.rename(path)
        assert await writer.commit([Unit("u3", [started("c")])]) == [Committed(2, 2)]
