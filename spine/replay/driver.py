"""Drives a running Spine with a recorded file: runs side by side, the lines of one run in their order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import anyio
import anyio.to_thread

from spine.explain.story import ABORTED_STATES
from spine.explain.totals import Totals, totals
from spine.governance.operations import OperationContext, OperationResult
from spine.governance.transactions import (
    CompleteRun,
    CompletionConflict,
    RollbackNotSupportedError,
    TransactionFailed,
    TransactionPhase,
    completion_digest,
)
from spine.kernel.errors import NotRunning, SpineError, SpineFailed
from spine.replay.ledger import RunLedger
from spine.replay.lines import (
    BadLine,
    Line,
    NumberedLine,
    RecordedOperation,
    RecordedOutcome,
    RunCompleted,
    RunStarted,
    parse,
    read_lines,
)

if TYPE_CHECKING:
    from spine.journal.reader import JournalReader
    from spine.journal.rows import TransactionRow
    from spine.runtime import Spine

RUNS_AT_ONCE: Final = 32
LINES_WAITING: Final = 512
BYTES_WAITING: Final = 16 << 20
NAMES_MOST: Final = 10_000
STOP_WITHIN_S: Final = 10.0
_BATCH: Final = 64
_REFUSED_CODES: Final = frozenset({"IDEMPOTENCY_CONFLICT", "TENANT_MISMATCH", "INVALID_PARAMS"})
_UNRECORDED_CODES: Final = frozenset({"JOURNAL_UNAVAILABLE", "OUTCOME_UNRECORDED"})
_RECORDED_PHASES: Final = frozenset({TransactionPhase.ROLLED_BACK, TransactionPhase.PARKED})
_LATE_CODES: Final = frozenset({"OVERLOADED", "CANCELLED", "TIMEOUT", "IN_DOUBT"})


@dataclass(slots=True)
class _Job:
    number: int
    line: Line
    tenant_id: str
    size: int
    key: str | None = None


@dataclass(slots=True)
class _Load:
    """What is read but not yet answered; at least one line is always let in."""

    lines: int = 0
    bytes: int = 0
    lanes: dict[str, deque[_Job]] = field(default_factory=dict)

    def has_room(self, run_id: str, size: int) -> bool:
        if self.lines == 0:
            return True
        if self.lines >= LINES_WAITING or self.bytes + size > BYTES_WAITING:
            return False
        return run_id in self.lanes or len(self.lanes) < RUNS_AT_ONCE


class Replay:
    """One replay of one seekable file.

    ``refuse(number, reason)`` is told of every line that is not taken; ``progress(lines)`` of every line that is done
    with. ``refused_completions`` counts, by code, the rejected lines that are taken once nothing stands against the
    completion any more. ``strict`` stops at the first refused line. Call ``prepare`` before the Spine starts,
    ``drive`` while it runs.
    """

    def __init__(
        self,
        spine: Spine,
        file: BinaryIO,
        *,
        strict: bool = False,
        refuse: Callable[[int, str], None] = lambda _number, _reason: None,
        progress: Callable[[int], None] = lambda _lines: None,
    ) -> None:
        self.rejected_lines = 0
        self.unrecorded_lines = 0
        self.refused_completions: Counter[str] = Counter()
        self.failure: SpineError | None = None
        self._spine = spine
        self._file = file
        self._strict = strict
        self._refuse = refuse
        self.progress = progress
        self._reader: JournalReader | None = None
        self._ledger = RunLedger()
        self._load = _Load()
        self._changed = anyio.Event()
        self._stop = anyio.Event()
        self._abandoned = False
        self._scope: anyio.CancelScope | None = None
        self._recorded: dict[str, RecordedOutcome] = {}

    @property
    def stopped(self) -> bool:
        """Whether it ended before the end of the file."""
        return self._stop.is_set()

    def prepare(self) -> int:
        """Read the file once: give each operation the Spine does not know a handler, and return the number of lines."""
        names: set[str] = set()
        lines = 0
        for numbered in read_lines(self._file):
            lines += 1
            try:
                line = parse(numbered)
            except BadLine:
                continue
            if isinstance(line, RecordedOperation) and len(names) < NAMES_MOST:
                names.add(line.operation)
        for name in sorted(names):
            if not self._spine.has_operation(name):
                # Returning what was recorded has no effect, so it may be repeated after an interruption.
                self._spine.operation(name, idempotent=True)(self._answer)
        self._file.seek(0)
        return lines

    async def drive(self, reader: JournalReader) -> None:
        """Send every line; returns when all are answered or ``stop`` was called and what was taken is answered.

        ``reader`` tells what an earlier replay left in the same database.
        """
        self._reader = reader
        async with anyio.create_task_group() as group:
            self._scope = group.cancel_scope
            async for numbered in self._lines():
                job = self._check(numbered)
                if job is None:
                    self.progress(1)
                    continue
                run_id = job.line.run_id
                while not self._stop.is_set() and not self._load.has_room(run_id, job.size):
                    await self._changed.wait()
                if self._stop.is_set():
                    break
                self._load.lines += 1
                self._load.bytes += job.size
                lane = self._load.lanes.get(run_id)
                if lane is None:
                    self._load.lanes[run_id] = deque([job])
                    group.start_soon(self._serve, run_id)
                else:
                    lane.append(job)

    def stop(self, *, within_s: float = STOP_WITHIN_S) -> None:
        """Send no more lines; what is under way ends and is recorded, for at most ``within_s`` seconds."""
        self._abandoned = True
        if self._scope is not None:
            # What is under way is answered and recorded; only a call that hangs is given up.
            self._scope.deadline = anyio.current_time() + within_s
        self._end()

    def _end(self) -> None:
        """Read no more lines; those that were read before are still sent."""
        self._stop.set()
        self._notify()

    async def totals(self, reader: JournalReader) -> Totals:
        """Add up, from the journal, the runs of the lines read so far."""
        found = Totals()
        for run_id in self._ledger.run_ids():
            rows = await reader.run_rows(run_id)
            found.add(totals(rows, key_prefix=_key_prefix(run_id)))
        return found

    def close(self) -> None:
        """Let go of the bookkeeping; the file is the caller's."""
        self._ledger.close()

    async def _lines(self) -> AsyncIterator[NumberedLine]:
        lines = read_lines(self._file)
        take = partial(_take, lines)
        while not self._stop.is_set():
            batch = await anyio.to_thread.run_sync(take, abandon_on_cancel=True)
            if not batch:
                return
            for numbered in batch:
                if self._stop.is_set():
                    return
                yield numbered

    def _check(self, numbered: NumberedLine) -> _Job | None:
        try:
            line = parse(numbered)
            if isinstance(line, RunStarted):
                earlier = self._ledger.start(line.run_id, line.tenant_id)
                if earlier is not None:
                    raise BadLine(f"run {line.run_id!r} was already started on an earlier line, by tenant {earlier!r}")
                return _Job(numbered.number, line, line.tenant_id, len(numbered.raw))
            key = self._next_key(line.run_id) if isinstance(line, RecordedOperation) else None
            tenant_id = line.tenant_id or self._ledger.tenant(line.run_id)
            if tenant_id is None:
                raise BadLine(f"run {line.run_id!r} was not started on an earlier line, and field tenant_id is missing")
            if isinstance(line, RunCompleted):
                self._ledger.touch(line.run_id)
            return _Job(numbered.number, line, tenant_id, len(numbered.raw), key)
        except BadLine as bad:
            if bad.is_operation and bad.run_id is not None:
                # A line repaired later must not shift the keys of those after it.
                self._next_key(bad.run_id)
            self._reject(numbered.number, str(bad))
            if self._strict:
                self._end()
            return None

    def _next_key(self, run_id: str) -> str:
        return f"{_key_prefix(run_id)}{self._ledger.next_ordinal(run_id)}"

    async def _serve(self, run_id: str) -> None:
        lane = self._load.lanes[run_id]
        while lane and not self._abandoned:
            job = lane.popleft()
            refused = self.rejected_lines + self.unrecorded_lines
            try:
                await self._send(job)
            except (SpineFailed, NotRunning) as error:
                self.failure = error
                self.stop()
            except SpineError as error:
                self._unrecorded(job.number, str(error))
            if self._strict and self.rejected_lines + self.unrecorded_lines > refused:
                self.stop()
            self._load.lines -= 1
            self._load.bytes -= job.size
            self.progress(1)
            self._notify()
        del self._load.lanes[run_id]
        self._notify()

    async def _send(self, job: _Job) -> None:
        match job.line:
            case RunStarted() as line:
                decision = await self._spine.start_run(line.run_id, tenant_id=line.tenant_id, agent_id=line.agent_id)
                self._judge(job.number, decision.code, decision.reason)
            case RecordedOperation() as line:
                await self._execute(job, line)
            case RunCompleted() as line:
                await self._complete(job, line)

    async def _complete(self, job: _Job, line: RunCompleted) -> None:
        payload: dict[str, Any] = {
            "tenant_id": job.tenant_id,
            "run_status": line.run_status,
            "agent_id": line.agent_id,
            "error_code": line.error_code,
            "error_message": line.error_message,
        }
        earlier = await self._reader.transaction(line.run_id, "") if self._reader is not None else None
        if earlier is not None and earlier.state in ABORTED_STATES and not await self._interrupted(earlier):
            # It was rolled back when it was sent before: another attempt would make the record longer, not better.
            if earlier.digest != completion_digest(CompleteRun(run_id=line.run_id, **payload)):
                self._reject(job.number, f"the completion of run {line.run_id!r} was rolled back with another payload")
            return
        try:
            await self._spine.complete_run(line.run_id, **payload)
        except CompletionConflict as error:
            self._reject(job.number, str(error))
        except RollbackNotSupportedError as error:
            self._refused(job.number, "ROLLBACK_NOT_SUPPORTED", str(error))
        except TransactionFailed as error:
            self._failed(job.number, error)

    async def _interrupted(self, earlier: TransactionRow) -> bool:
        """Whether nothing but the end of a process rolled it back: then it is completed as if for the first time."""
        assert self._reader is not None and earlier.seq_ended is not None
        return bool((await self._reader.body_at(earlier.seq_ended)).get("interrupted"))

    def _failed(self, number: int, error: TransactionFailed) -> None:
        """Tell of a completion that is not in the journal; one that was rolled back or parked is counted there.

        Its phase tells them apart: a code may be a domain's own word.
        """
        code = str(error.code)
        if error.phase in _RECORDED_PHASES and error.transaction_id is not None:
            return
        if error.phase is not TransactionPhase.NOT_STARTED:
            self._unrecorded(number, f"{code}: {error}")
        elif code in _REFUSED_CODES:
            self._reject(number, f"{code}: {error}")
        else:
            self._refused(number, code, str(error))

    async def _execute(self, job: _Job, line: RecordedOperation) -> None:
        key = str(job.key)
        self._recorded[key] = line.outcome
        try:
            result = await self._spine.execute(
                line.operation,
                tenant_id=job.tenant_id,
                run_id=line.run_id,
                params=line.params,
                idempotency_key=key,
                wait=True,
            )
        finally:
            del self._recorded[key]
        taken = result.decision is None or result.decision.allowed
        self._judge(job.number, result.error_code, result.error or "", taken=taken, recorded=result.durable)

    def _judge(
        self, number: int, code: str | None, reason: str, *, taken: bool = False, recorded: bool = False
    ) -> None:
        if code in _REFUSED_CODES and not taken:
            self._reject(number, f"{code}: {reason}")
        elif (code in _UNRECORDED_CODES and not recorded) or (code in _LATE_CODES and not taken):
            self._unrecorded(number, f"{code}: {reason}")

    async def _answer(self, ctx: OperationContext) -> OperationResult:
        outcome = self._recorded.get(ctx.idempotency_key or "")
        if outcome is None:
            return OperationResult.fail(
                f"no outcome of {ctx.operation} is recorded for this call", "NO_RECORDED_OUTCOME"
            )
        if outcome.success:
            return OperationResult.ok(outcome.data)
        return OperationResult.fail(outcome.error or "", outcome.error_code or "FAILED")

    def _reject(self, number: int, reason: str) -> None:
        self.rejected_lines += 1
        self._refuse(number, reason)

    def _refused(self, number: int, code: str, reason: str) -> None:
        """A line that would be taken if things stood otherwise."""
        self.refused_completions[code] += 1
        self._reject(number, f"{code}: {reason}")

    def _unrecorded(self, number: int, reason: str) -> None:
        self.unrecorded_lines += 1
        self._refuse(number, f"not recorded: {reason}")

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _key_prefix(run_id: str) -> str:
    return f"replay:{run_id}:"


def _take(lines: Iterator[NumberedLine]) -> list[NumberedLine]:
    batch: list[NumberedLine] = []
    size = 0
    for numbered in lines:
        batch.append(numbered)
        size += len(numbered.raw)
        if len(batch) == _BATCH or size >= BYTES_WAITING // 4:
            break
    return batch
