"""SQLite's log is copied back when nobody writes, and a batch waits for it only so long."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from spine.governance.units import StorageFailed, Unit
from spine.journal.oslock import FileLock
from spine.journal.session import Session
from tests.unit.journal_kit import all_committed, started, writing

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_the_log_is_copied_back_when_idle_and_at_the_end(sqlite_url: str) -> None:
    copied, checkpoint = threading.Event(), Session.checkpoint

    with pytest.MonkeyPatch.context() as patch:

        def seen(session: Session, pages: int) -> bool:
            done = checkpoint(session, pages)
            copied.set()
            return done

        patch.setattr(Session, "checkpoint", seen)
        async with writing(sqlite_url, idle_s=0.01) as writer:
            assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
            assert await asyncio.to_thread(copied.wait, 10)
        assert not Path(sqlite_url.partition("///")[2] + "-wal").exists()


async def test_a_checkpoint_runs_only_while_no_other_process_writes(sqlite_url: str) -> None:
    async with writing(sqlite_url, idle_s=60) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        other = FileLock(Path(sqlite_url.partition("///")[2] + "-spine.lock"))
        assert other.share(0)
        wants_again = await writer._worker.call(writer._core.idle)
        assert wants_again
        other.release()
        wants_again = await writer._worker.call(writer._core.idle)
        assert not wants_again
        other.close()


async def test_a_batch_waits_for_another_process_checkpoint_only_so_long(sqlite_url: str) -> None:
    async with writing(sqlite_url, busy_timeout_ms=20) as writer:
        other = FileLock(Path(sqlite_url.partition("///")[2] + "-spine.lock"))
        assert other.own()
        (outcome,) = await writer.commit([Unit("u1", [started("a")])])
        assert isinstance(outcome, StorageFailed)
        assert "copying the log" in outcome.error
        other.release()
        assert all_committed(await writer.commit([Unit("u1", [started("a")])]))
        other.close()
