"""The outbox: hands what is committed to the publisher and the POST domains, at least once, in order within a run."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

from actors.effect_calls import Answer, Answered, EffectCalls, Unanswered
from actors.judged import judged
from actors.recorder import Recorder
from actors.records import ack
from actors.rows import ContractRows, RunRows
from spine.domains import Refused
from spine.effects import Effect, Post
from spine.governance.failpoints import PUBLISH, PUBLISHED, Failpoint
from spine.governance.recordable import copied
from spine.governance.transactions import DomainClass
from spine.governance.units import CommitOutcome, Committed, Record, StorageFailed
from spine.kernel.errors import JournalError, Overloaded
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope
from spine.kernel.restart import backoff
from spine.kernel.tasks import Tasks
from spine.parts import Part
from spine.publisher import POST, Event, Publisher

PUBLISH_S = 10.0
QUEUED_MOST = 10_000
DELIVERIES = 64
LINES_MOST = 1024
RELOAD_S = 5.0
# After so many failed tries a delivery is told as stuck; it is tried on.
STUCK_ATTEMPTS = 5
# ... and when it has waited for so long (seconds).
STUCK_S = 30.0


class PendingEvents(ContractRows, RunRows, Protocol):
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
    since: float
    failed: int = 0


@dataclass(slots=True)
class _Line:
    """What one run has waiting; once something of it found no room, nothing may follow."""

    waiting: deque[_Delivery] = field(default_factory=deque)
    cut: bool = False


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
        parts: Sequence[Part],
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
        self._posts = {part.name: part for part in parts if part.cls is DomainClass.POST}
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
        self._gates = {name: asyncio.Semaphore(DELIVERIES) for name in ("", *(f"{POST}{post}" for post in self._posts))}

    def _crashed(self, name: str, error: BaseException) -> None:
        self._exchange.tracer.fault("spine.task.crashed", exc=error, actor="outbox", task=name)

    async def stop(self, seconds: float) -> bool:
        """End every delivery within ``seconds``; what is undelivered stays pending in the journal."""
        return await self._tasks.cancel(seconds)

    def __len__(self) -> int:
        return len(self._queued)

    def deliver(
        self, events: Sequence[Event], cause: Envelope | None = None, *, first: bool = False
    ) -> asyncio.Future[bool]:
        """Queue committed events of one run; the future tells whether the first try delivered them.

        ``cause`` is the message whose commit they follow, if this process took it; ``first`` tells that no event of the
        run waits before them: else that is looked up.
        """
        first_try: asyncio.Future[bool] = self._exchange.loop.create_future()
        new = [event for event in events if event.event_id not in self._queued]
        line = self._lines.get(new[0].run_id) if new else None
        if line is not None:
            line.cut |= len(self._queued) >= QUEUED_MOST
        if not new or len(self._queued) >= QUEUED_MOST or (line is not None and line.cut):
            # They are durable as pending: the next reload finds them.
            first_try.set_result(not events)
            return first_try
        self._queued.update(event.event_id for event in new)
        run_id = new[0].run_id
        if line is not None:
            line.waiting.append(self._delivery(new, first_try, cause))
            return first_try
        line = self._lines[run_id] = _Line(deque([self._delivery(new, first_try, cause)]))
        try:
            self._tasks.spawn(self._serve(run_id, line, first=first), f"outbox {run_id}")
        except Overloaded:
            del self._lines[run_id]
            self._queued.difference_update(event.event_id for event in new)
            first_try.set_result(False)
        return first_try

    def _delivery(self, events: list[Event], first_try: asyncio.Future[bool], cause: Envelope | None) -> _Delivery:
        return _Delivery(events, first_try, cause, self._exchange.clock.monotonic())

    def stuck(self) -> int:
        """How many deliveries wait for longer than ``STUCK_S`` seconds or have failed ``STUCK_ATTEMPTS`` times."""
        long_ago = self._exchange.clock.monotonic() - STUCK_S
        waiting = (delivery for line in self._lines.values() for delivery in line.waiting)
        return sum(delivery.since <= long_ago or delivery.failed >= STUCK_ATTEMPTS for delivery in waiting)

    async def keep(self, tasks: Tasks) -> None:
        """Look every ``RELOAD_S`` seconds until cancelled."""
        await tasks.every(RELOAD_S, self._look, "outbox", self._exchange.clock)

    async def _look(self) -> None:
        """Deliver what an earlier process left, and what did not fit."""
        # What is delivered while the journal is read is pending in that reading only.
        self._delivered.clear()
        try:
            # In this order: whoever has committed an event holds a lease since before.
            pending = await self._source.pending_events(QUEUED_MOST)
            others = await self._source.living(self._exchange.clock.time_us()) - {self._instance}
        except JournalError as error:
            self._exchange.tracer.fault("spine.outbox.unreadable", exc=error)
            return
        runs: dict[str, list[Event]] = {}
        for body in pending:
            if body["event_id"] not in self._delivered:
                runs.setdefault(body["run_id"], []).append(event_of(body))
        for run_id, events in runs.items():
            # In order: what somebody else must deliver holds up what comes after it.
            ours = list(itertools.takewhile(partial(self._takes, others), events))
            if ours and run_id not in self._lines:
                for event in ours:
                    self.deliver([event], first=True)

    def _takes(self, others: Container[str], event: Event) -> bool:
        """Whether this Spine delivers it: its own or nobody's, for a domain that it has, or a publisher of its own."""
        if event.type.startswith(POST) and event.type.removeprefix(POST) not in self._posts:
            return False
        if event.instance == self._instance:
            return True
        return event.instance not in others and (self._redeliver or event.type.startswith(POST))

    async def _makes_way(self, run_id: str, line: _Line) -> bool:
        """Put before the line what of the run still waits in the journal; ``False`` when others must deliver that."""
        try:
            bodies = [row.body for row in await self._source.run_rows(run_id, "event", "event.published")]
            others = await self._source.living(self._exchange.clock.time_us()) - {self._instance}
        except JournalError as error:
            self._exchange.tracer.fault("spine.outbox.unreadable", exc=error)
            return False
        done = published(bodies)
        waiting = [event_of(body) for body in bodies if body["kind"] == "event" and body["event_id"] not in done]
        own = line.waiting[0].events[0].event_id
        ahead = list(itertools.takewhile(lambda event: event.event_id != own, waiting))
        if not all(self._takes(others, event) for event in ahead):
            return False
        for event in reversed(ahead):
            self._queued.add(event.event_id)
            line.waiting.appendleft(self._delivery([event], self._exchange.loop.create_future(), None))
        return True

    async def _serve(self, run_id: str, line: _Line, *, first: bool) -> None:
        try:
            if not first and not await self._makes_way(run_id, line):
                return
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
        left = list(delivery.events)
        clock = self._exchange.clock
        while left:
            event = left[0]
            attempt = delivery.failed + 1
            # A domain that hangs holds up no other, nor the publisher.
            async with self._gates[event.type if event.type.startswith(POST) else ""]:
                error = await self._publish(event, attempt)
            if error is None:
                left.pop(0)
                continue
            delivery.failed = attempt
            self._counts["events_failed"] += 1
            if not delivery.first_try.done():
                delivery.first_try.set_result(False)
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
                "attempts": delivery.failed + 1,
            },
        )
        # Who is told that its events are published finds that in the journal.
        recorded = await self._record(
            delivery, [done, *(self._ack(e) for e in delivery.events if e.type.startswith(POST))]
        )
        await self._failpoint(f"{PUBLISHED}.after")
        if not delivery.first_try.done():
            delivery.first_try.set_result(isinstance(recorded, Committed))

    async def _record(self, delivery: _Delivery, rows: list[Record]) -> CommitOutcome:
        """Record a delivery; what a POST domain acknowledges may be the last word that the contract waited for."""
        run_id = delivery.events[0].run_id
        commit = partial(self._recorder.commit, run_id=run_id, parent=delivery.cause)
        if len(rows) == 1:
            return await commit(rows)
        try:
            return await judged(run_id, rows, self._source, commit, lambda: rows[0].at)
        except JournalError as error:
            # It stays pending, and is delivered again.
            return StorageFailed(str(error))

    async def _publish(self, event: Event, attempt: int) -> BaseException | None:
        if event.type.startswith(POST):
            answer = await self._post(event, attempt)
        else:
            # Its own payload: what the publisher changes in it must not reach the next try.
            told = partial(self._publisher.publish, replace(event, payload=copied(dict(event.payload))))
            deadline = self._exchange.clock.monotonic() + PUBLISH_S
            answer = await self._calls.run("the publisher", PUBLISH, told, deadline)
        match answer:
            case Answered():
                return None
            case Unanswered():
                return answer.cause or TimeoutError(answer.error)
            case Refused():
                return answer

    async def _post(self, event: Event, attempt: int) -> Answer:
        name = event.type.removeprefix(POST)
        part = self._posts[name]
        effect = Effect(
            event.event_id,
            event.tx_id,
            event.run_id,
            event.tenant_id,
            event.epoch,
            attempt,
            self._exchange.clock.monotonic() + part.timeout_s,
            copied(event.payload["descriptor"]),
        )
        return await self._calls.call(name, "post", cast(Post, part.domain).post, effect)

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


def published(bodies: Iterable[Mapping[str, Any]]) -> set[str]:
    """The ids of the events that these journal rows say are published."""
    return {event_id for body in bodies if body["kind"] == "event.published" for event_id in body["event_ids"]}


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
