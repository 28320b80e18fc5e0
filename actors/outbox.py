"""The outbox: hands committed events to the publisher, at least once, in order within a run, until they are taken."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio

from actors.recorder import Recorder
from spine.governance.units import Committed, Record
from spine.kernel.errors import JournalError, Overloaded
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope
from spine.kernel.restart import backoff
from spine.kernel.tasks import Tasks
from spine.publisher import Event, Publisher

PUBLISH_S = 10.0
QUEUED_MOST = 10_000
DELIVERIES = 64
LINES_MOST = 1024
RELOAD_S = 5.0


class PendingEvents(Protocol):
    """Where undelivered events are found."""

    async def living(self, now_us: int) -> set[str]:
        """The instances that live at that time (unix microseconds): each delivers its own events."""
        ...

    async def pending_events(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """The bodies of the oldest undelivered events, in order."""
        ...


@dataclass(slots=True)
class _Delivery:
    events: list[Event]
    first_try: asyncio.Future[bool]
    cause: Envelope | None


@dataclass(slots=True)
class _Line:
    """What one run has waiting."""

    waiting: deque[_Delivery] = field(default_factory=deque)


class Outbox:
    """One line a run, one task a line, at most ``DELIVERIES`` deliveries at a time."""

    def __init__(
        self,
        exchange: Exchange,
        ids: Ids,
        recorder: Recorder,
        source: PendingEvents,
        publisher: Publisher,
        *,
        instance: str,
        counts: dict[str, int],
    ) -> None:
        self._exchange = exchange
        self._ids = ids
        self._recorder = recorder
        self._source = source
        self._publisher = publisher
        self._instance = instance
        self._counts = counts
        # Of its own, so that a dead publisher holds up no completion.
        self._tasks = Tasks("outbox", limit=LINES_MOST, on_crash=self._crashed)
        self._lines: dict[str, _Line] = {}
        self._queued: set[str] = set()
        self._delivered: set[str] = set()
        self._gate = asyncio.Semaphore(DELIVERIES)

    def _crashed(self, name: str, error: BaseException) -> None:
        self._exchange.tracer.fault("spine.task.crashed", exc=error, actor="outbox", task=name)

    async def stop(self, seconds: float) -> bool:
        """End every delivery within ``seconds``; what is undelivered stays pending in the journal."""
        return await self._tasks.cancel(seconds)

    def __len__(self) -> int:
        return len(self._queued)

    def deliver(self, events: Sequence[Event], cause: Envelope | None = None) -> asyncio.Future[bool]:
        """Queue committed events of one run; the future tells whether the first try delivered them.

        ``cause`` is the message whose commit they follow, if this process took it.
        """
        first_try: asyncio.Future[bool] = self._exchange.loop.create_future()
        new = [event for event in events if event.event_id not in self._queued]
        if not new or len(self._queued) >= QUEUED_MOST:
            # They are durable as pending: the next reload finds them.
            first_try.set_result(not events)
            return first_try
        self._queued.update(event.event_id for event in new)
        run_id = new[0].run_id
        line = self._lines.get(run_id)
        if line is not None:
            line.waiting.append(_Delivery(new, first_try, cause))
            return first_try
        line = self._lines[run_id] = _Line(deque([_Delivery(new, first_try, cause)]))
        try:
            self._tasks.spawn(self._serve(run_id, line), f"outbox {run_id}")
        except Overloaded:
            del self._lines[run_id]
            self._queued.difference_update(event.event_id for event in new)
            first_try.set_result(False)
        return first_try

    async def keep(self) -> None:
        """Deliver what an earlier process left, and what did not fit; until cancelled."""
        clock = self._exchange.clock
        while True:
            # What is delivered while the journal is read is pending in that reading only.
            self._delivered.clear()
            try:
                others = await self._source.living(clock.time_us()) - {self._instance}
                pending = await self._source.pending_events(QUEUED_MOST)
            except JournalError as error:
                self._exchange.tracer.fault("spine.outbox.unreadable", exc=error)
                pending = []
            runs: dict[str, list[Event]] = {}
            for body in pending:
                if body["event_id"] not in self._delivered and body.get("instance") not in others:
                    runs.setdefault(body["run_id"], []).append(event_of(body))
            for events in runs.values():
                if events[0].run_id not in self._lines:
                    self.deliver(events)
            await clock.sleep_until(clock.monotonic() + RELOAD_S)

    async def _serve(self, run_id: str, line: _Line) -> None:
        try:
            while line.waiting:
                delivery = line.waiting[0]
                await self._deliver(delivery)
                line.waiting.popleft()
                self._queued.difference_update(event.event_id for event in delivery.events)
                self._delivered.update(event.event_id for event in delivery.events)
        finally:
            del self._lines[run_id]
            for delivery in line.waiting:
                self._queued.difference_update(event.event_id for event in delivery.events)
                if not delivery.first_try.done():
                    delivery.first_try.set_result(False)

    async def _deliver(self, delivery: _Delivery) -> None:
        attempt = 0
        left = list(delivery.events)
        clock = self._exchange.clock
        while left:
            attempt += 1
            async with self._gate:
                error = await self._publish(left[0])
            if error is None:
                left.pop(0)
                continue
            self._counts["events_failed"] += 1
            if not delivery.first_try.done():
                delivery.first_try.set_result(False)
            event = left[0]
            self._exchange.tracer.fault(
                "spine.event.failed", exc=error, event_id=event.event_id, run_id=event.run_id, attempt=attempt
            )
            delay = backoff(attempt, first_s=0.1, most_s=30.0, jitter=self._ids.uniform(0.0, 0.25))
            await clock.sleep_until(clock.monotonic() + delay)
        self._counts["events_published"] += len(delivery.events)
        first = delivery.events[0]
        done = Record(
            "event.published",
            clock.time_us(),
            {
                "tx_id": first.tx_id,
                "run_id": first.run_id,
                "tenant_id": first.tenant_id,
                "event_ids": [event.event_id for event in delivery.events],
                "attempts": attempt,
            },
        )
        # Who is told that its events are published finds that in the journal.
        recorded = await self._recorder.commit([done], run_id=first.run_id, parent=delivery.cause)
        if not delivery.first_try.done():
            delivery.first_try.set_result(isinstance(recorded, Committed))

    async def _publish(self, event: Event) -> Exception | None:
        try:
            with anyio.fail_after(PUBLISH_S):
                await self._publisher.publish(event)
        except Exception as error:  # noqa: BLE001  a publisher is foreign code: its failure is logged and tried again
            return error
        return None


def event_of(body: Mapping[str, Any]) -> Event:
    """The event that a journal row holds."""
    return Event(
        body["event_id"],
        body["tx_id"],
        body["run_id"],
        body["tenant_id"],
        body["n"],
        body["type"],
        body["payload"],
        body.get("instance", ""),
    )
