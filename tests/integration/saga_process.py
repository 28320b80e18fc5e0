"""A process that completes a run with domains outside, for the tests that kill it or freeze it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from actors import recovery
from spine import Refused, Settings, Spine, TransactionFailed
from spine.settings import Retry


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


class Remote:
    """Tells each call; stands still at the one it is told to, until a line comes in."""

    timeout_s, attempts = 50.0, 3

    def __init__(self, name: str, after: tuple[str, ...], stands_at: str, effects: Path, *, refuses: bool) -> None:
        self.name, self.after = name, after
        self._stands_at, self._effects, self._refuses = stands_at, effects, refuses

    async def forward(self, effect: Any) -> dict[str, str]:
        await self._called("forward", effect)
        if self._refuses:
            raise Refused("NO_FUNDS", "the account is empty")
        return {"id": f"{self.name}-{effect.id}"}

    async def rollback(self, effect: Any) -> None:
        await self._called("rollback", effect)

    async def _called(self, what: str, effect: Any) -> None:
        call = {"what": what, "domain": self.name, "id": effect.id, "tx_id": effect.tx_id, "epoch": effect.epoch}
        with self._effects.open("a") as log:
            log.write(json.dumps(call | {"refused": self._refuses}) + "\n")
        if self._stands_at == f"{what} {self.name}":
            say(stands_at=self._stands_at)
            await asyncio.to_thread(sys.stdin.readline)


async def main(url: str, effects: str, stands_at: str, refusing: str, lease_s: str) -> None:
    recovery.LEASE_S = float(lease_s)  # type: ignore[misc]
    log = Path(effects)
    domains = [
        Remote("pay", (), stands_at, log, refuses=refusing == "pay"),
        Remote("ship", ("pay",), stands_at, log, refuses=refusing == "ship"),
    ]
    settings = Settings(retry=Retry(attempts=3, first_s=0.001, most_s=0.002))
    async with Spine(url, domains=domains, settings=settings) as spine:
        say(ready=True)
        try:
            done = await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
            say(ended=done.phase, tx_id=done.transaction_id)
        except TransactionFailed as error:
            say(ended=error.phase, tx_id=error.transaction_id, code=error.code)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
