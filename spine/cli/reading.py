"""A journal reader for the length of one command."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spine.journal.reader import JournalReader


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[JournalReader]:
    """Open the database at ``url`` for reading; a missing one is an error, never created."""
    import anyio

    from spine.journal.reader import JournalReader

    reader = JournalReader(url)
    try:
        yield reader
    finally:
        with anyio.CancelScope(shield=True):
            await reader.close()
