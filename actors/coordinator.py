"""The coordinator: completes runs, all domains or none, and records what workers report about them.

It understands ``CompleteRun``, ``ResolveTransaction``, ``RetryTransaction``, ``CreatePolicyEvaluation``, ``EmitLesson``
and ``Acknowledge``. Each continues in an owned task: a completion of LOCAL domains is one unit of work, one with
domains outside is driven by a saga. What is committed is handed to the outbox; what was left in flight is taken over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from actors import attempts, outbox, takeover
from actors.attempts import Attempts
from actors.dependencies import Dependencies
from actors.effect_calls import EffectCalls
from actors.moves import Driving
from actors.outbox import Outbox
from actors.parking import Parking
from actors.recorder import Recorder
from actors.reports import Reports
from actors.takeover import Takeover
from actors.transaction_log import TransactionLog
from spine.governance.contract import Acknowledge
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.failpoints import Failpoint
from spine.governance.parking import ResolveTransaction, RetryTransaction
from spine.governance.transactions import CompleteRun, TxState
from spine.kernel.actor import Actor
from spine.kernel.messages import Envelope
from spine.kernel.tasks import Tasks
from spine.parts import Part
from spine.publisher import Publisher
from spine.settings import Retry

NAME = "coordinator"
STOP_S = 3.0
COUNTED = (
    "committed",
    "aborted",
    "compensated",
    "parked",
    "recovered",
    "events_published",
    "events_failed",
)
Message = CompleteRun | ResolveTransaction | RetryTransaction | CreatePolicyEvaluation | EmitLesson | Acknowledge


class Source(attempts.Source, outbox.PendingEvents, takeover.StrandedSource, Protocol):
    """The journal as the coordinator reads it."""


@dataclass(slots=True)
class Completions:
    """What the coordinator works with; outlives its incarnations.

    With ``redeliver`` it also delivers what Spines that live no more left undelivered.
    """

    dependencies: Dependencies
    source: Source
    parts: Sequence[Part]
    publisher: Publisher
    recorder: Recorder
    redeliver: bool
    retry: Retry
    failpoint: Failpoint
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    unended: dict[str, int] = field(default_factory=dict)
    stuck: Callable[[], int] = lambda: 0

    def to_dict(self) -> dict[str, int]:
        """For health: what was done since the start, and what is unended in the database as of the last look."""
        parked = self.unended.get(TxState.PARKED, 0)
        in_flight = sum(self.unended.values()) - parked
        return {**self.counts, "events_stuck": self.stuck(), "in_flight": in_flight, "parked_now": parked}


class Coordinator(Actor):
    """All domains or none."""

    name = NAME

    def __init__(self, completions: Completions) -> None:
        deps, own = completions.dependencies, completions
        super().__init__(deps.exchange)
        self._own = own
        self._tasks = Tasks(NAME, limit=deps.calls_most, on_crash=self.task_crashed)
        self._calls = EffectCalls(deps.exchange, own.failpoint, self.task_crashed)
        self._outbox = Outbox(
            deps.exchange,
            deps.ids,
            own.recorder,
            own.source,
            own.publisher,
            parts=own.parts,
            redeliver=own.redeliver,
            calls=self._calls,
            failpoint=own.failpoint,
            instance=deps.instance,
            counts=own.counts,
        )
        own.stuck = self._outbox.stuck
        driving = Driving(
            deps.exchange,
            deps.ids,
            own.recorder,
            self._calls,
            own.failpoint,
            own.retry,
            own.counts,
            TransactionLog(deps.exchange.tracer),
            own.source,
        )
        self._attempts = Attempts(deps, own.source, own.parts, driving, self._outbox)
        self._takeover = Takeover(
            deps.exchange,
            own.recorder,
            own.source,
            own.parts,
            instance=deps.instance,
            failpoint=own.failpoint,
            unended=own.unended,
            driven=self._attempts.drives,
            drive=self._attempts.resume,
        )
        self._parking = Parking(
            deps.exchange, own.recorder, own.source, own.parts, instance=deps.instance, failpoint=own.failpoint
        )
        self._reports = Reports(deps, own.recorder, own.parts)
        self._housekeeping: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"Coordinator(running={len(self._attempts)}, outbox={len(self._outbox)})"

    async def start(self) -> None:
        """Begin to deliver what is pending and to take over what is stranded."""
        self._housekeeping.append(self._tasks.spawn(self._outbox.keep(self._tasks), "outbox"))
        self._housekeeping.append(self._tasks.spawn(self._takeover.keep(self._tasks), "takeover"))

    async def stop(self) -> bool:
        """Let running completions end or be undone; what is left stays in the journal, to be gone on with."""
        for task in self._housekeeping:
            task.cancel()
        self._takeover.interrupt()
        self._attempts.interrupt()
        await self._tasks.drained(STOP_S)
        delivered = await self._outbox.stop(0.5)
        ended = await self._tasks.cancel(0.5)
        return await self._calls.stop(0.5) and ended and delivered

    def receive(self, envelope: Envelope) -> None:
        """Begin what the message asks for."""
        message: Message = envelope.payload
        match message:
            case CompleteRun():
                self._tasks.answer(envelope, self._attempts.complete(envelope, message))
            case ResolveTransaction():
                self._tasks.answer(envelope, self._parking.resolve(envelope, message))
            case RetryTransaction():
                self._tasks.answer(envelope, self._parking.retry(envelope, message))
            case CreatePolicyEvaluation():
                self._tasks.answer(envelope, self._reports.evaluation(envelope, message))
            case EmitLesson():
                self._tasks.answer(envelope, self._reports.lesson(envelope, message))
            case Acknowledge():
                self._tasks.answer(envelope, self._reports.acknowledge(envelope, message))
            case _:
                assert_never(message)
