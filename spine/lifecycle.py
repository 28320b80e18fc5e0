"""A started Spine from the inside: what is started in which order, drained, stopped in reverse, and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import anyio

from spine.health import Health
from spine.kernel.errors import MailboxClosed, NotRunning, SpineFailed
from spine.kernel.exchange import Exchange
from spine.kernel.supervisor import START_UNDO_S, Receipt, Supervisor
from spine.kernel.watchdog import Watchdog
from spine.settings import Settings


class Opened(Protocol):
    """Something that is closed at the end."""

    async def close(self) -> None:
        """Give back what it holds."""
        ...


class Openable(Opened, Protocol):
    """Something that is opened first."""

    async def open(self) -> None:
        """Take what it needs."""
        ...


@dataclass(slots=True)
class Gauges:
    """What the actors count, each read when health is asked."""

    governance: Callable[[], dict[str, Any]]
    decisions: Callable[[], dict[str, int]]
    transactions: Callable[[], dict[str, int]]
    contracts: Callable[[], dict[str, int]]
    journal: Callable[[], dict[str, Any]]


@dataclass(slots=True)
class Lifecycle:
    """Starts and stops the parts of one Spine."""

    settings: Settings
    exchange: Exchange
    supervisor: Supervisor
    watchdog: Watchdog
    writer: Openable
    reader: Opened
    gauges: Gauges

    async def start(self) -> None:
        """Open the journal, then start the actors in order."""
        try:
            await self.writer.open()
            await self.supervisor.start()
        except BaseException:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + self.settings.stop_s):
                await self.supervisor.stop(START_UNDO_S)
                await self._close()
            raise
        self.watchdog.start()

    async def stop(self) -> list[Receipt]:
        """Close the ingress, drain, interrupt, stop in reverse, close the journal."""
        exchange, settings = self.exchange, self.settings
        give_up = exchange.loop.time() + settings.stop_s
        if exchange.closed is None:
            exchange.close(NotRunning("this Spine is stopping: it takes no new calls"))
        await self._drained(min(settings.drain_s, settings.stop_s / 2))
        receipts = await self.supervisor.stop(max(1.0, give_up - exchange.loop.time()))
        self.watchdog.stop()
        left = max(0.5, give_up - exchange.loop.time())
        with anyio.move_on_after(left) as overdue:
            await self._close()
        if overdue.cancelled_caught:
            # The database does not answer: its thread is a daemon and holds nothing that was acknowledged.
            exchange.tracer.fault("spine.journal.leaked", seconds=left)
            receipts.append(Receipt("journal", "leaked", round(left, 3)))
        return receipts

    async def _drained(self, seconds: float) -> None:
        exchange = self.exchange
        idle = exchange.loop.create_future()
        exchange.on_idle(idle)
        if not isinstance(exchange.closed, SpineFailed):
            await asyncio.wait([idle], timeout=seconds)
        exchange.on_idle(None)

    async def _close(self) -> None:
        exchange = self.exchange
        for mailbox in exchange.mailboxes.values():
            exchange.bury(mailbox)
        for envelope in list(exchange.ledger.open.values()):
            envelope.fail(MailboxClosed("this Spine stopped before it answered: the journal tells what was done"))
        # The writer last: only the last connection to go can fold SQLite's log back into the file.
        await self.reader.close()
        await self.writer.close()

    def health(self, phase: str) -> Health:
        """A snapshot of everything that counts something."""
        exchange, supervisor, gauges = self.exchange, self.supervisor, self.gauges
        messages = exchange.ledger.counts()
        failed = isinstance(exchange.closed, SpineFailed)
        journal = gauges.journal()
        return Health(
            ok=not failed and journal["available"] and messages.balanced,
            status="failed" if failed else phase,
            governance=gauges.governance(),
            messages=messages,
            actors=supervisor.states(),
            mailboxes={name: len(mailbox) for name, mailbox in exchange.mailboxes.items()},
            decisions=gauges.decisions(),
            transactions=gauges.transactions(),
            contracts=gauges.contracts(),
            journal=journal | {"log_events_lost": exchange.tracer.lost},
            restarts=supervisor.restarted,
            crashes=tuple(asdict(crash) for crash in supervisor.crashes),
            dead_letters=tuple(asdict(letter) for letter in exchange.dead_letters),
            blocked=tuple(asdict(report) for report in self.watchdog.reports),
        )
