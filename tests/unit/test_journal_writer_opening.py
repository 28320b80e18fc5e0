"""A writer is opened once, finishes what it was given when it is closed, and names misuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spine.governance.units import Unit
from spine.journal.writer import JournalWriter
from spine.kernel.errors import ConfigurationError, JournalError, JournalUnavailable
from tests.unit.journal_kit import all_committed, started

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


async def test_misuse_is_named(journal_url: str) -> None:
    writer = JournalWriter(journal_url)
    with pytest.raises(JournalError, match="not open"):
        await writer.commit([])
    await writer.close()
    await writer.open()
    with pytest.raises(JournalError, match="opened before"):
        await writer.open()
    await writer.close()
    await writer.close()
    with pytest.raises(JournalError, match="closed"):
        await writer.commit([])


async def test_close_finishes_what_was_given(journal_url: str) -> None:
    writer = JournalWriter(journal_url)
    await writer.open()
    given = [asyncio.ensure_future(writer.commit([Unit(f"u{n}", [started(f"r{n}")])])) for n in range(5)]
    await asyncio.sleep(0)
    await writer.close()
    assert all_committed([outcome for batch in await asyncio.gather(*given) for outcome in batch])


async def test_a_database_that_cannot_be_opened_says_so(tmp_path: Any) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/dir/x.db", "postgresql+psycopg://root@127.0.0.1:1/none"):
        with pytest.raises(JournalUnavailable, match="cannot be used"):
            await JournalWriter(url).open()
    with pytest.raises(ConfigurationError):
        JournalWriter("sqlite:///:memory:")
