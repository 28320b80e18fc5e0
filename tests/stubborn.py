"""Code that does not end when it is told to."""

from __future__ import annotations

import asyncio


async def swallow_cancellation(until: asyncio.Event) -> None:
    """Wait for the event, whoever cancels meanwhile."""
    while not until.is_set():
        try:
            await until.wait()
        except asyncio.CancelledError:
            continue
