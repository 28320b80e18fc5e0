"""The outbox: hands what is committed to the publisher and the POST domains, at least once, in order within a run."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import anyio

from actors.effect_calls import Answered, EffectCalls, Unanswered
from actors.recorder import Recorder
from actors.records import ack
from spine.domains import Refused
from spine.effects import Effect, Post, timeout_of
from spine.governance.failpoints import PUBLISH, PUBLISHED, Failpoint
from spine.governance.units import Committed, Record
from spine.kernel.errors import JournalError, Overloaded
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope
from spine.kernel.restart import backoff
from spine.kernel.tasks import Tasks, cancelling
from spine.publisher import POST, Event, Publisher

PUBLISH_S = 10.0
QUEUED_MOST = 10_000
DELIVERIES = 64
LINES_MOST = 1024
RELOAD_S = 5.0
# After so many failed tries a delivery is told as stuck; it is tried on.
STUCK_ATTEMPTS = 5


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
    stuck: bool = False


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
        posts: Mapping[str, Post],
        redeliver: bool,
        calls: EffectCalls,
        failpoint: Failpoint,
        instance: str,
        counts: dict[str, int],
    ) -> None:
        self._exchange = exchange
        self._ids = ids
        self._recorder = recorder
        self._source = source
        self._publisher = publisher
        self._posts = posts
        self._redeliver = redeliver
        self._calls = calls
        self._failpoint = failpoint
        self._instance = instance
        self._counts = counts
        # Of its own, so that a dead publisher holds up no completion.
        self._tasks = Tasks("outbox", limit=LINES_MOST, on_crash=self._crashed)
        self._lines: dict[str, _Line] = {}
        self._queued: set[str] = set()
        self._delivered: set[str] = set()
        self._gate = asyncio.Semaphore(DELIVERIES)
        # Runs with events that wait in the journal alone: what such a run commits later waits behind them.
        self._behind: set[str] = set()
        self._left: set[str] = set()
        self._looked = not redeliver

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
        if new and self._looked and not any(new[0].run_id in runs for runs in (self._behind, self._left)):
            self._queue(_Delivery(new, first_try, cause))
        else:
            # They are durable as pending: the next reload finds them, and what they come after.
            first_try.set_result(not events)
            self._leave(new)
        return first_try

    def _queue(self, delivery: _Delivery) -> None:
        run_id = delivery.events[0].run_id
        if len(self._queued) >= QUEUED_MOST:
            delivery.first_try.set_result(False)
            self._leave(delivery.events)
            return
        self._queued.update(event.event_id for event in delivery.events)
        line = self._lines.get(run_id)
        if line is not None:
            line.waiting.append(delivery)
            return
        line = self._lines[run_id] = _Line(deque([delivery]))
        try:
            self._tasks.spawn(self._serve(run_id, line), f"outbox {run_id}")
        except Overloaded:
            del self._lines[run_id]
            self._queued.difference_update(event.event_id for event in delivery.events)
            delivery.first_try.set_result(False)
            self._leave(delivery.events)

    def _leave(self, events: Sequence[Event]) -> None:
        """Remember that these wait for the next reload."""
        if self._redeliver:
            self._left.update(event.run_id for event in events)

    async def keep(self) -> None:
        """Look again and again, until cancelled."""
        clock = self._exchange.clock
        while True:
            await clock.sleep_until(clock.monotonic() + RELOAD_S)
            await self.look()

    async def look(self) -> None:
        """Deliver what an earlier process left, and what did not fit.

        Before the first look nothing is delivered: it would overtake them.
        """
        # What is delivered while the journal is read is pending in that reading only.
        self._delivered.clear()
        # What is left from here on may be missing in it.
        self._behind |= self._left
        self._left.clear()
        try:
            others = await self._source.living(self._exchange.clock.time_us()) - {self._instance}
            pending = await self._source.pending_events(QUEUED_MOST)
        except JournalError as error:
            self._exchange.tracer.fault("spine.outbox.unreadable", exc=error)
        else:
            self._take(pending, others)

    def _take(self, pending: Sequence[Mapping[str, Any]], others: Container[str]) -> None:
        """Queue what this Spine delivers of the ``pending`` events, and note which runs have others."""
        runs: dict[str, list[Event]] = {}
        for body in pending:
            if body["event_id"] not in self._delivered:
                runs.setdefault(body["run_id"], []).append(event_of(body))
        for run_id, events in runs.items():
            # In order: what somebody else must deliver holds up what comes after it.
            ours = list(itertools.takewhile(partial(self._takes, others), events))
            if ours and run_id not in self._lines:
                for event in ours:
                    self._queue(_Delivery([event], self._exchange.loop.create_future(), None))
        self._behind = {
            run_id for run_id, events in runs.items() if any(event.event_id not in self._queued for event in events)
        }
        # Where there is more than one reading holds, any run may be behind.
        self._looked = len(pending) < QUEUED_MOST

    def _takes(self, others: Container[str], event: Event) -> bool:
        """Whether this Spine delivers it: no living one will, and it has the domain, or a publisher of its own."""
        if event.instance in others:
            return False
        if event.type.startswith(POST):
            return event.type.removeprefix(POST) in self._posts
        return self._redeliver

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
                self._leave(delivery.events)
                if not delivery.first_try.done():
                    delivery.first_try.set_result(False)

    async def _deliver(self, delivery: _Delivery) -> None:
        try:
            await self._deliver_all(delivery)
        finally:
            self._counts["events_stuck"] -= delivery.stuck

    async def _deliver_all(self, delivery: _Delivery) -> None:
        attempt = 0
        left = list(delivery.events)
        clock = self._exchange.clock
        while left:
            attempt += 1
            async with self._gate:
                error = await self._publish(left[0], attempt)
            if error is None:
                left.pop(0)
                continue
            self._counts["events_failed"] += 1
            if attempt >= STUCK_ATTEMPTS and not delivery.stuck:
                delivery.stuck = True
                self._counts["events_stuck"] += 1
            if not delivery.first_try.done():
                delivery.first_try.set_result(False)
            event = left[0]
            self._exchange.tracer.fault(
                "spine.event.failed", exc=error, event_id=event.event_id, run_id=event.run_id, attempt=attempt
            )
            delay = backoff(attempt, first_s=0.1, most_s=30.0, jitter=self._ids.uniform(0.0, 0.25))
            await clock.sleep_until(clock.monotonic() + delay)
        self._counts["events_published"] += len(delivery.events)
        await self._failpoint(f"{PUBLISHED}.before")
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
        rows = [done, *(self._ack(event) for event in delivery.events if event.type.startswith(POST))]
        recorded = await self._recorder.commit(rows, run_id=first.run_id, parent=delivery.cause)
        await self._failpoint(f"{PUBLISHED}.after")
        if not delivery.first_try.done():
            delivery.first_try.set_result(isinstance(recorded, Committed))

    async def _publish(self, event: Event, attempt: int) -> BaseException | None:
        if event.type.startswith(POST):
            return await self._post(event, attempt)
        await self._failpoint(f"{PUBLISH}.before")
        try:
            with anyio.fail_after(PUBLISH_S):
                await self._publisher.publish(event)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and cancelling():
                raise
            return error
        await self._failpoint(f"{PUBLISH}.after")
        return None

    async def _post(self, event: Event, attempt: int) -> BaseException | None:
        name = event.type.removeprefix(POST)
        domain = self._posts[name]
        effect = Effect(
            event.event_id,
            event.tx_id,
            event.run_id,
            event.tenant_id,
            event.epoch,
            attempt,
            self._exchange.clock.monotonic() + timeout_of(domain),
            event.payload["descriptor"],
        )
        match await self._calls.call(name, "post", domain.post, effect):
            case Answered():
                return None
            case Unanswered() as answer:
                return answer.cause or TimeoutError(answer.error)
            case Refused() as refusal:
                return refusal

    def _ack(self, event: Event) -> Record:
        return ack(
            event.run_id,
            event.tenant_id,
            event.type.removeprefix(POST),
            event.payload["action"],
            at=self._exchange.clock.time_us(),
            tx_id=event.tx_id,
            result_id=event.event_id,
        )


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
        body["epoch"],
    )
