"""The supervisor: starts its children in order, restarts the one that crashes, stops them in reverse.

Vocabulary and semantics are OTP's (child spec, restart type, intensity, period). The supervisor runs in one task that
owns every child; start, exit and stop reach it as messages, so that no cancel scope is ever shared between tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

import anyio
from anyio.abc import TaskGroup

from spine.kernel.actor import Actor
from spine.kernel.errors import ActorCrashed, ConfigurationError, SpineError, SpineFailed, describe
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.mailbox import Passage
from spine.kernel.messages import Envelope, Stop
from spine.kernel.restart import RestartType, Strategy, add_restart, backoff, restarts, wants_restart

KILL_GRACE_S = 1.0
# How long the children that had started get to stop when another could not start.
START_UNDO_S = 5.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How one child is started, when it is restarted, and how many seconds its stop may take (> 0)."""

    id: str
    start: Callable[[], Actor]
    restart: RestartType = "permanent"
    shutdown_s: float = 5.0
    start_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.id or self.shutdown_s <= 0 or self.start_s <= 0:
            raise ConfigurationError(
                f"child spec {self.id!r} needs an id and positive shutdown_s and start_s, "
                f"not {self.shutdown_s!r} and {self.start_s!r}"
            )


@dataclass(frozen=True, slots=True)
class Policy:
    """Which children restart together and how often: at most ``intensity`` restarts in ``period_s`` seconds."""

    strategy: Strategy = "one_for_one"
    intensity: int = 3
    period_s: float = 5.0
    backoff_first_s: float = 0.01
    backoff_most_s: float = 1.0


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What a crash leaves: who, on what, which restart of how many follows, and what had come in last."""

    actor: str
    error: str
    restart: int
    intensity: int
    messages: tuple[str, ...]
    state: str
    ring: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """How one child stopped: ``clean``, ``forced`` (cancelled) or ``leaked`` (still there), and in how many seconds."""

    child: str
    end: Literal["clean", "forced", "leaked"]
    seconds: float


@dataclass(slots=True)
class _Exit:
    child: str
    generation: int
    error: BaseException | None


@dataclass(slots=True)
class _Shutdown:
    deadline_s: float


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    generation: int = 0
    actor: Actor | None = None
    task: asyncio.Task[None] | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    was_ready: bool = False
    left: bool = False
    taken: list[Envelope] = field(default_factory=list)
    crash: ActorCrashed | None = None


class Supervisor:
    """Owns the children of one exchange."""

    def __init__(self, exchange: Exchange, ids: Ids, specs: Sequence[ChildSpec], policy: Policy | None = None) -> None:
        names = [spec.id for spec in specs]
        if len(set(names)) != len(names):
            raise ConfigurationError(f"two child specs share an id: {names}")
        self._exchange = exchange
        self._ids = ids
        self._policy = policy or Policy()
        self._children = {spec.id: _Child(spec) for spec in specs}
        self._history: list[float] = []
        self._tell, self._inbox = anyio.create_memory_object_stream[_Exit | _Shutdown](8 * len(specs) + 8)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._started: asyncio.Future[None] = exchange.loop.create_future()
        self.restarted = 0
        self.crashes: list[CrashReport] = []
        self.receipts: list[Receipt] = []

    async def start(self) -> None:
        """Start the children in order, each ready before the next; raises what the one that failed raised."""
        self._task = asyncio.create_task(self._own(), name="spine.supervisor")
        await asyncio.shield(self._started)

    async def stop(self, deadline_s: float) -> list[Receipt]:
        """Stop the children in reverse within ``deadline_s`` seconds and give a receipt for each."""
        if self._task is None:
            self._tell.close()
            self._inbox.close()
            return []
        if not self._task.done():
            if not self._stopping:
                self._tell.send_nowait(_Shutdown(deadline_s))
            await asyncio.wait([self._task], timeout=deadline_s + 2 * KILL_GRACE_S)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=KILL_GRACE_S)
        told = {receipt.child for receipt in self.receipts}
        for name, child in reversed(self._children.items()):
            if name not in told:
                left = child.task is not None and not child.task.done()
                self.receipts.append(Receipt(name, "leaked" if left else "clean", 0.0))
        return self.receipts

    def states(self) -> dict[str, str]:
        """Each child's state: ready, starting or stopped."""
        return {
            name: "stopped" if child.task is None else "ready" if child.ready.is_set() else "starting"
            for name, child in self._children.items()
        }

    async def _own(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._exchange.deadlines.run, name="spine.deadlines")
            starting = asyncio.create_task(self._start_all(), name="spine.supervisor.start")
            try:
                await self._serve(group, starting)
            finally:
                starting.cancel()
                if self._exchange.closed is None:
                    self._exchange.close(SpineFailed("the supervisor itself ended: read the log, restart the process"))
                self._stopping = True
                self._tell.close()
                self._inbox.close()
                group.cancel_scope.cancel()

    async def _start_all(self) -> None:
        try:
            for child in self._children.values():
                await self._start(child)
        except Exception as error:  # noqa: BLE001  supervision boundary: start() raises it to the embedding program
            self._tell.send_nowait(_Shutdown(START_UNDO_S))
            if not self._started.done():
                self._started.set_exception(error)
        else:
            if not self._started.done():
                self._started.set_result(None)

    async def _serve(self, group: TaskGroup, starting: asyncio.Task[None]) -> None:
        async for message in self._inbox:
            match message:
                case _Exit():
                    if not self._exited(message, group, first_start=not starting.done()):
                        await self._shutdown(START_UNDO_S)
                        return
                case _Shutdown(deadline_s=seconds):
                    starting.cancel()
                    await self._shutdown(seconds)
                    return
                case _:
                    assert_never(message)

    async def _start(self, child: _Child) -> None:
        child.generation += 1
        ready, ended = child.ready, child.ended = asyncio.Event(), asyncio.Event()
        child.was_ready = False
        child.task = task = asyncio.create_task(
            self._incarnation(child, child.generation), name=f"spine.{child.spec.id}.{child.generation}"
        )
        waits = [asyncio.ensure_future(ready.wait()), asyncio.ensure_future(ended.wait())]
        try:
            await asyncio.wait(waits, timeout=child.spec.start_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if ready.is_set():
            self._exchange.tracer.life("spine.actor.started", actor=child.spec.id, generation=child.generation)
            return
        if ended.is_set() and child.crash is not None and child.crash.__cause__ is not None:
            raise child.crash.__cause__
        task.cancel()
        raise SpineFailed(f"actor {child.spec.id!r} was not ready within {child.spec.start_s} s: see the log for why")

    async def _restart(self, names: list[str], failed: str, delay: float) -> None:
        """Stop the failed child's siblings in reverse, wait, then start all of ``names`` in order."""
        for name in reversed(names):
            if name != failed:
                await self._halt(self._children[name])
        await self._exchange.clock.sleep_until(self._exchange.clock.monotonic() + delay)
        for name in names:
            if self._stopping:
                return
            try:
                await self._start(self._children[name])
            except Exception as error:  # noqa: BLE001  supervision boundary: its exit message decides what follows
                self._exchange.tracer.fault("spine.actor.start_failed", exc=error, actor=name)
                return

    async def _halt(self, sibling: _Child) -> None:
        task = sibling.task
        sibling.generation += 1
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=sibling.spec.shutdown_s)
        sibling.task = None
        sibling.ready = asyncio.Event()
        sibling.crash = ActorCrashed(sibling.spec.id, "-", len(self._history), "restarted with a sibling that crashed")
        self._fail_taken(sibling, sibling.crash)

    async def _incarnation(self, child: _Child, generation: int) -> None:
        error: BaseException | None = None
        try:
            actor = child.actor = child.spec.start()
            try:
                await actor.start()
                await actor.resume(tuple(child.taken), child.crash)
                child.taken.clear()
                child.crash = None
                child.was_ready = True
                child.ready.set()
                await actor.run()
            finally:
                with anyio.CancelScope(shield=True, deadline=anyio.current_time() + child.spec.shutdown_s):
                    child.left = await actor.stop() is False
        except asyncio.CancelledError as cancelled:
            error = cancelled
        except Exception as crash:  # noqa: BLE001  supervision boundary: the exit message carries it
            error = crash
        if error is not None and not child.was_ready:
            child.crash = self._crashed(child, error)
        child.ended.set()
        if not self._stopping:
            self._tell.send_nowait(_Exit(child.spec.id, generation, error))
        elif error is not None and not isinstance(error, asyncio.CancelledError):
            # Nobody serves exits any more, but who waits for this message is told all the same.
            self._report(child, error)

    def _exited(self, exit_: _Exit, group: TaskGroup, *, first_start: bool) -> bool:
        """Decide what follows an exit; ``False`` when the intensity is exceeded and everything fails."""
        child = self._children[exit_.child]
        if exit_.generation != child.generation or (first_start and not child.was_ready):
            return True
        child.task = None
        child.ready = asyncio.Event()
        exchange, policy = self._exchange, self._policy
        crashed = exit_.error is not None
        again = wants_restart(child.spec.restart, crashed=crashed)
        allowed = True
        if again:
            self._history, allowed = add_restart(
                self._history, exchange.clock.monotonic(), intensity=policy.intensity, period_s=policy.period_s
            )
        if crashed:
            self._report(child, exit_.error)
        if not again:
            return True
        if not allowed:
            failure = SpineFailed(
                f"actor {child.spec.id!r} crashed more than {policy.intensity} times in {policy.period_s} s, the last "
                f"time with {describe(exit_.error) if exit_.error else 'a normal end'}: read the crash report, mend "
                "the cause and restart the process"
            )
            exchange.tracer.fault("spine.failed", exc=failure, actor=child.spec.id)
            exchange.close(failure)
            return False
        self.restarted += 1
        exchange.tracer.life("spine.actor.restarting", actor=child.spec.id, restart=len(self._history))
        delay = backoff(
            len(self._history),
            first_s=policy.backoff_first_s,
            most_s=policy.backoff_most_s,
            jitter=self._ids.uniform(0.0, 0.5),
        )
        names = restarts(policy.strategy, list(self._children), child.spec.id)
        group.start_soon(self._restart, names, child.spec.id, delay, name=f"spine.restart.{child.spec.id}")
        return True

    def _crashed(self, child: _Child, error: BaseException) -> ActorCrashed:
        crash = ActorCrashed(child.spec.id, "-", len(self._history) + 1, describe(error))
        crash.__cause__ = error
        return crash

    def _report(self, child: _Child, error: BaseException | None) -> None:
        exchange = self._exchange
        name = child.spec.id
        taken = list(exchange.ledger.held_by(name))
        report = CrashReport(
            actor=name,
            error=describe(error) if error is not None else "ended",
            restart=len(self._history),
            intensity=self._policy.intensity,
            messages=tuple(f"{exchange.tracer.msg_id(e.number)} {type(e.payload).__name__}" for e in taken),
            state=repr(child.actor),
            ring=tuple(exchange.mailbox(name).passages()),
        )
        del self.crashes[:-15]
        self.crashes.append(report)
        facts: dict[str, Any] = {
            "actor": name,
            "restart": report.restart,
            "intensity": report.intensity,
            "messages": report.messages,
            "state": report.state,
            "ring": [f"{p.kind}#{p.number} from {p.sender}" for p in report.ring[-8:]],
        }
        exchange.tracer.fault("spine.actor.crashed", exc=error, **facts)
        child.crash = ActorCrashed(name, "-", report.restart, report.error)
        self._fail_taken(child, child.crash)

    def _fail_taken(self, child: _Child, crash: ActorCrashed) -> None:
        """End what the incarnation had taken, or keep it for the next one to answer."""
        exchange = self._exchange
        answered_later = type(child.actor).resume is not Actor.resume if child.actor is not None else False
        for envelope in exchange.ledger.held_by(child.spec.id):
            if envelope.reply_to is None:
                exchange.dead_letter(envelope, crash)
            elif answered_later:
                if envelope not in child.taken:
                    child.taken.append(envelope)
            else:
                msg_id = str(exchange.tracer.msg_id(envelope.number))
                envelope.fail(ActorCrashed(crash.actor, msg_id, crash.restart, crash.detail))

    async def _shutdown(self, deadline_s: float) -> None:
        self._stopping = True
        give_up = time.monotonic() + deadline_s
        for child in reversed(self._children.values()):
            began = time.monotonic()
            allowed = max(0.0, min(child.spec.shutdown_s, give_up - began))
            end = await self._stop_child(child, allowed)
            receipt = Receipt(child.spec.id, end, round(time.monotonic() - began, 3))
            self.receipts.append(receipt)
            self._exchange.tracer.life("spine.actor.stopped", actor=child.spec.id, end=end, seconds=receipt.seconds)
            if end == "leaked":
                self._exchange.tracer.fault("spine.actor.leaked", actor=child.spec.id)

    async def _stop_child(self, child: _Child, allowed_s: float) -> Literal["clean", "forced", "leaked"]:
        task = child.task
        if task is None or task.done():
            return "clean"
        if child.ready.is_set():
            # Straight into its mailbox: the router stops before the audit actor does.
            try:
                self._exchange.signal(child.spec.id, Stop(), timeout_s=allowed_s + 1.0, sender="supervisor")
            except SpineError:
                task.cancel()
            done, _ = await asyncio.wait([task], timeout=allowed_s)
            if done:
                return "leaked" if child.left else "clean"
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=KILL_GRACE_S)
        return "forced" if done else "leaked"
