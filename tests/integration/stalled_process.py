"""A process that ends in the midst of a transaction whenever it comes to one place; its environment says where."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors import recovery, saga, takeover
from spine import RunFacts, Settings, Spine, Write
from spine.effects import Effect
from spine.settings import Retry

DIES_IN = os.environ.get("DIES_IN", "")
STALLED_MOST = 3


def here(place: str) -> None:
    """Out of memory, a fault in an extension: nothing of Python's own is run any more."""
    if place == DIES_IN:
        os._exit(9)


class Pay:
    """EXTERNAL: what stands of it is a file."""

    name, after, timeout_s, attempts = "pay", (), 20, 2

    def __init__(self, live: Path) -> None:
        self._live = live

    async def forward(self, effect: Effect) -> dict[str, str]:
        here("forward")
        self._live.write_text(effect.id)
        return {"id": "p1"}

    async def rollback(self, effect: Effect) -> None:
        here("rollback")
        self._live.unlink(missing_ok=True)


class Book:
    """LOCAL, after the payment."""

    name, after = "book", ("pay",)

    def plan(self, run: RunFacts) -> Sequence[Write]:
        here("plan")
        if "refused" in run.run_status:
            raise ValueError("the books are closed")
        return []


async def main(url: str, live: str, status: str) -> None:
    recovery.LEASE_S = 0.2  # type: ignore[misc]
    takeover.TICK_S, saga.STALLED_MOST = 0.02, STALLED_MOST
    settings = Settings(retry=Retry(attempts=2, first_s=0.001, most_s=0.002))
    async with Spine(url, domains=[Pay(Path(live)), Book()], settings=settings) as spine:
        if status:
            try:
                await spine.complete_run("run-1", tenant_id="acme", run_status=status)
            except Exception as error:
                print(type(error).__name__, getattr(error, "code", ""))
            return
        reader: Any = spine._system.reader  # type: ignore[union-attr]
        while (await reader.unended()).keys() - {"PARKED"}:
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
