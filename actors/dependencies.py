"""What the registry works with; made once by the composition root, it outlives the registry's incarnations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.calls import Call
from actors.recall import KeySource, Recall
from actors.recorder import Recorder
from actors.recovery import OpenDecisions, Recovery
from actors.rows import ContractRows
from actors.runs import KnownRuns, RunSource
from actors.switch import GovernanceSource, Switch
from spine.governance.authority import Rule, Verdict
from spine.governance.contract import Expectation
from spine.governance.operations import Operation
from spine.governance.units import CommitOutcome, Record
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids


class Source(RunSource, KeySource, GovernanceSource, OpenDecisions, ContractRows, Protocol):
    """The journal as registry and coordinator read it."""


@dataclass(slots=True)
class Counts:
    """What the authority has done since the process started."""

    allowed: int = 0
    denied: int = 0
    degraded: int = 0
    bypassed: int = 0
    rule_errors: int = 0
    failed_open: int = 0
    check_errors: int = 0
    stuck: int = 0

    def decided(self, verdict: Verdict) -> None:
        """Count a verdict."""
        decision = verdict.decision
        if not decision.allowed:
            self.denied += 1
        elif decision.degraded:
            self.degraded += 1
        else:
            self.allowed += 1
        self.rule_errors += verdict.rule_errors
        self.bypassed += verdict.effect == "bypassed"
        self.failed_open += verdict.effect == "failed_open"


@dataclass(slots=True)
class Dependencies:
    """The registry's collaborators and its frozen declarations."""

    exchange: Exchange
    ids: Ids
    source: Source
    instance: str
    operations: Mapping[str, Operation]
    rules: Mapping[str, Sequence[Rule]]
    promises: Callable[[Sequence[Expectation]], tuple[Expectation, ...]]
    calls_most: int
    calls: set[Call] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)
    switch: Switch = field(init=False)
    recorder: Recorder = field(init=False)
    recovery: Recovery = field(init=False)
    runs: KnownRuns = field(init=False)
    recall: Recall = field(init=False)

    def __post_init__(self) -> None:
        exchange = self.exchange
        self.switch = Switch(self.source, exchange.clock, exchange.tracer)
        self.recorder = Recorder(exchange, self.ids, "registry", self._lost, self._stale)
        self.recovery = Recovery(exchange, self.recorder, self.source, self.instance)
        self.runs = KnownRuns(self.source)
        self.recall = Recall(self.source, exchange.clock)

    def handles(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether a handler runs in this task."""
        return any(call.task is task for call in self.calls)

    def to_dict(self) -> dict[str, int]:
        """What is not yet recorded, for health."""
        return {
            "buffered_rows": self.recorder.buffered_rows,
            "buffered_lost": self.recorder.buffered_lost,
            "unrecorded": len(self.recovery.unrecorded),
        }

    def _stale(self) -> None:
        self.recovery.look_again()

    def _lost(self, record: Record, _: CommitOutcome) -> None:
        if record.kind == "outcome":
            self.recovery.remember(record)
