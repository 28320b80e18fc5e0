"""Which runs are known to exist, and for whom: a bounded memory in front of the journal."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

KNOWN_MOST = 65_536


class RunRow(Protocol):
    """What the journal tells of a run."""

    @property
    def tenant_id(self) -> str: ...

    @property
    def started_seq(self) -> int: ...


class RunSource(Protocol):
    """Where runs are looked up."""

    async def run(self, run_id: str) -> RunRow | None:
        """The run's row, or ``None``."""
        ...


class KnownRuns:
    """Tells whose a run is; while one caller starts a run, the others wait for that start instead of racing it."""

    def __init__(self, source: RunSource) -> None:
        self._source = source
        self._tenants: OrderedDict[str, str] = OrderedDict()
        self._starting: dict[str, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def cached(self, run_id: str) -> str | None:
        """The tenant of a run that is known without asking the journal."""
        return self._tenants.get(run_id)

    async def tenant(self, run_id: str) -> str | None:
        """The run's tenant; ``None`` makes the caller its starter, who must call ``started`` or ``abandoned``."""
        while True:
            if (tenant := self._tenants.get(run_id)) is not None:
                return tenant
            if (pending := self._starting.get(run_id)) is not None:
                await asyncio.shield(pending)
                continue
            self._starting[run_id] = asyncio.get_running_loop().create_future()
            try:
                row = await self._source.run(run_id)
            except BaseException:
                self.abandoned(run_id)
                raise
            if row is None:
                return None
            self.started(run_id, row.tenant_id)
            return row.tenant_id

    def started(self, run_id: str, tenant_id: str) -> None:
        """The run exists now."""
        self._tenants[run_id] = tenant_id
        if len(self._tenants) > KNOWN_MOST:
            self._tenants.popitem(last=False)
        self.abandoned(run_id)

    def abandoned(self, run_id: str) -> None:
        """The start did not happen; the next caller tries."""
        pending = self._starting.pop(run_id, None)
        if pending is not None and not pending.done():
            pending.set_result(None)
