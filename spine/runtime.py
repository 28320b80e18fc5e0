"""Spine: the composition root. It wires kernel, actors and journal together and gives them their public face."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from threading import get_ident
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel

from spine._install import check_install
from spine.declarations import Declarations
from spine.explain.why import Explanation, explain
from spine.governance.authority import GovernanceState
from spine.governance.contract import promised
from spine.governance.operations import (
    Execute,
    OperationResult,
    RegistryStatus,
    SwitchGovernance,
    timeout_problem,
)
from spine.health import Health
from spine.kernel.errors import NotRunning, Overloaded
from spine.kernel.exchange import ROUTER, Exchange
from spine.kernel.ids import Ids
from spine.kernel.mailbox import Passage
from spine.kernel.messages import Envelope, Lane, Reply, Request
from spine.kernel.router import Router
from spine.kernel.supervisor import ChildSpec, Receipt, Supervisor
from spine.kernel.tracing import Level, Tracer
from spine.kernel.watchdog import Watchdog
from spine.lifecycle import Gauges, Lifecycle
from spine.operating import Operating
from spine.parts import participants
from spine.publisher import Publisher, publisher_of
from spine.requests import RECIPIENTS, UNANSWERED, Posted, governed
from spine.runs import Runs
from spine.settings import Settings, default_url

# Somebody else's `actors` must be refused by name before anything of it is imported.
check_install()

from actors import audit, coordinator, registry  # noqa: E402
from actors.audit import Audit, Progress  # noqa: E402
from actors.calls import ANSWER_MARGIN_S  # noqa: E402
from actors.coordinator import Completions, Coordinator  # noqa: E402
from actors.dependencies import Dependencies  # noqa: E402
from actors.reconciler import Reconciler  # noqa: E402
from actors.recorder import Recorder  # noqa: E402
from actors.registry import Registry  # noqa: E402

T = TypeVar("T")

CALL_S = 30.0
# What registry and coordinator have under way beside two tasks for every admission credit, each.
_TASKS_SPARE = 64
# The Spines that run in this process, newest last: what compat's shims find when nobody called ``compat.connect``.
_RUNNING: list[Spine] = []


def _forked() -> None:
    """In a forked child: the parent's Spines are not the child's."""
    for spine in _RUNNING:
        spine._phase = "forked"
    _RUNNING.clear()


os.register_at_fork(after_in_child=_forked)


class Spine(Declarations, Operating, Runs):
    """One runtime authority over one database; bound to the event loop it is started on.

    ``domains`` take part in every run completion, ``publisher`` gets the events after it. Raises
    ``ConfigurationError`` for a declaration that cannot work.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        domains: Sequence[object] = (),
        publisher: Publisher | None = None,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.url = url or default_url()
        self._participants = participants(domains)
        # Only an application, which names a publisher or domains, takes over what others left: a command on the
        # database must swallow no events.
        self._publisher, self._redeliver = publisher_of(publisher), publisher is not None or bool(domains)
        self._settings = settings or Settings()
        self._system: _System | None = None
        self._phase: Literal["new", "starting", "running", "stopping", "stopped", "forked"] = "new"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[list[Receipt]] | None = None
        self._thread = self._pid = 0

    async def status(self) -> dict[str, Any]:
        """What the registry holds now: each operation's limits and how many calls run and wait."""
        return await self._ask(RegistryStatus())

    # -- life

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop this Spine runs on."""
        return self._loop

    @property
    def is_running(self) -> bool:
        """Whether calls are taken."""
        return self._phase == "running"

    @property
    def pid(self) -> int:
        """The process that started this Spine; 0 before."""
        return self._pid

    @staticmethod
    def running() -> Spine | None:
        """The Spine that was started last of those that run in this process, if there is one."""
        return _RUNNING[-1] if _RUNNING else None

    async def start(self) -> None:
        """Open the journal and start the actors; raises ``NotRunning`` when started already, ``JournalError``."""
        if self._phase in ("starting", "running", "stopping"):
            raise NotRunning(f"this Spine is {self._phase} already: start it once, or make another one")
        self._phase, self._pid = "starting", os.getpid()
        self._freeze()
        try:
            system = _System(self)
            await system.life.start()
        except BaseException:
            self._phase = "stopped"
            raise
        self._system, self._loop, self._thread = system, system.exchange.loop, get_ident()
        self._phase = "running"
        _RUNNING.append(self)
        for rule in self._idle_rules():
            system.exchange.tracer.fault("spine.rule.unmatched", rule=rule, remedy="correct its pattern or remove it")

    async def stop(self) -> list[Receipt]:
        """Refuse new calls, let running ones end, interrupt the rest, stop the actors; gives a receipt for each."""
        system = self._system
        if self._stopping is not None and self._phase == "stopping":
            return await asyncio.shield(self._stopping)
        if system is None or self._phase != "running":
            return []
        self._check_place()
        self._phase = "stopping"
        _RUNNING.remove(self)
        stopping = self._stopping = asyncio.create_task(system.life.stop(), name="spine.stop")
        stopping.add_done_callback(self._stopped)
        try:
            return await asyncio.shield(stopping)
        except asyncio.CancelledError:
            # A half-stopped Spine would leave its threads and files behind: the stop has its own deadline. Only the
            # handler that stops its own Spine must not be waited for by itself.
            while not stopping.done() and not system.dependencies.handles(asyncio.current_task()):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(stopping)
            raise

    def _stopped(self, _: object) -> None:
        self._phase = "stopped"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: object = None) -> AsyncIterator[dict[str, Any]]:
        """Run with an ASGI application: ``FastAPI(lifespan=spine.lifespan)``."""
        async with self:
            yield {"spine": self}

    # -- asking

    async def execute(
        self,
        operation: str,
        *,
        tenant_id: str,
        run_id: str | None = None,
        params: Mapping[str, Any] | BaseModel | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = 30,
        wait: bool = False,
    ) -> OperationResult:
        """Run an operation under the authority; every governed ending is a result.

        ``timeout_s`` seconds bound waiting, deciding and handling, and at most 10 s more may go by while the end is
        recorded; ``wait`` lets a full spine mailbox be waited for.
        Raises ``NotRunning``, ``SpineFailed`` or ``ActorCrashed``.
        """
        request = Execute(operation, tenant_id, run_id, params, idempotency_key, timeout_s)
        try:
            return await self._ask(request, timeout_s=_bounded(timeout_s), wait=wait)
        except UNANSWERED as error:
            return cast(OperationResult, governed(request, error, self._last_known()))

    async def ask(self, request: Request[T]) -> T:
        """Send any of Spine's requests through the spine mailbox; the shims' requests are answered the same way."""
        try:
            return await self._ask(request, timeout_s=getattr(request, "timeout_s", CALL_S))
        except UNANSWERED as error:
            ended = governed(request, error, self._last_known())
            if isinstance(ended, BaseException):
                raise ended from error
            return cast(T, ended)

    def post(
        self, request: Request[Any], *, timeout_s: float, on_done: Callable[[Any, BaseException | None], None]
    ) -> Posted:
        """Send a request from the loop's thread; ``on_done(value, error)`` is called there exactly once.

        Raises ``NotRunning`` and ``SpineFailed``; every other end is told through ``on_done``.
        """
        state = self._use().dependencies.switch.state

        def told(value: Any, error: BaseException | None) -> None:
            if isinstance(error, UNANSWERED):
                ended = governed(request, error, state)
                value, error = (None, ended) if isinstance(ended, BaseException) else (ended, None)
            on_done(value, error)

        try:
            return Posted(self._post(request, timeout_s=timeout_s, reply_to=Reply(told)))
        except Overloaded as error:
            told(None, error)
            return Posted(None)

    async def why(self, run_id: str) -> Explanation:
        """Why the run ended as it did, from the journal alone; raises ``LookupError`` for a run it does not know."""
        system = self._use()
        rows = await system.reader.run_rows(run_id)
        intact = await system.reader.run_evidence(run_id, rows)
        return explain(rows, now_us=system.clock.time_us(), intact=intact, run_id=run_id)

    def black_box(self) -> dict[str, list[Passage]]:
        """The last envelopes that went into each mailbox, oldest first, without their payloads."""
        return {name: mailbox.passages() for name, mailbox in self._use().exchange.mailboxes.items()}

    def health(self) -> Health:
        """A snapshot of counters, actors, mailboxes and faults; never waits."""
        return self._use().life.health(self._phase)

    async def flush(self) -> None:
        """Return once everything buffered is durable."""
        await self._use().dependencies.recorder.flushed()

    @property
    def trace(self) -> Level:
        """The level of the message log: off, decisions or messages; may be set while running."""
        return self._use().exchange.tracer.level

    @trace.setter
    def trace(self, level: Level) -> None:
        self._use().exchange.tracer.level = level

    # -- inside

    def _check_place(self) -> None:
        # Thread and loop are compared without a system call: this is on the way of every message.
        if self._phase == "forked":
            raise NotRunning(
                f"this Spine was started by process {self._pid} and this is its fork {os.getpid()}: make one here"
            )
        if self._thread != get_ident() or self._loop is None or not self._loop.is_running():
            raise NotRunning(
                "this Spine runs on another event loop: call it there, or from synchronous code through compat"
            )

    def _last_known(self) -> GovernanceState:
        return GovernanceState() if self._system is None else self._system.dependencies.switch.state

    def _use(self) -> _System:
        if self._system is None or self._phase not in ("running", "forked"):
            raise NotRunning(f"this Spine is {self._phase}: use it inside `async with spine:` or after `await start()`")
        self._check_place()
        return self._system

    def _post(
        self, request: Request[Any], *, timeout_s: float, reserved: bool = False, reply_to: Reply | None = None
    ) -> Envelope:
        exchange = self._use().exchange
        recipient = RECIPIENTS.get(type(request))
        if recipient is None:
            raise TypeError(f"{type(request).__name__} is not a request that Spine understands")
        lane = Lane.CONTROL if isinstance(request, SwitchGovernance) else Lane.INGRESS
        margin = ANSWER_MARGIN_S if isinstance(request, Execute) else 0.0
        return exchange.post(
            request, recipient, timeout_s=timeout_s + margin, lane=lane, reserved=reserved, reply_to=reply_to
        )

    async def _ask(self, request: Request[T], *, timeout_s: float = CALL_S, wait: bool = False) -> T:
        exchange = self._use().exchange
        if wait:
            began = exchange.clock.monotonic()
            await exchange.reserve(timeout_s)
            if isinstance(request, Execute) and not timeout_problem(request.timeout_s):
                request.timeout_s = max(1e-3, timeout_s - (exchange.clock.monotonic() - began))
        try:
            envelope = self._post(request, timeout_s=timeout_s, reserved=wait)
        except BaseException:
            if wait:
                exchange.unreserve()
            raise
        return cast(T, await exchange.answer(envelope))


def _bounded(timeout_s: object) -> float:
    return CALL_S if timeout_problem(timeout_s) else float(cast(float, timeout_s))


class _System:
    """The wiring: which parts a started Spine has, and which of them know of each other."""

    def __init__(self, spine: Spine) -> None:
        # SQLAlchemy costs a quarter of a second to import: only who opens a journal pays for it.
        from spine.journal.reader import JournalReader
        from spine.journal.writer import JournalWriter

        settings = spine._settings
        ids = Ids(settings.clock, settings.seed)
        level = settings.trace or cast(Level, os.environ.get("SPINE_TRACE") or "off")
        writer, reader = JournalWriter(spine.url), JournalReader(spine.url)
        tracer = Tracer(ids.span_id(), level)
        exchange = Exchange(settings.clock, tracer, credits=settings.credits, spare=4 * _TASKS_SPARE)
        parts, progress = spine._participants, Progress()
        acting = tuple(part.promise for part in parts)
        deps = Dependencies(
            exchange=exchange,
            ids=ids,
            source=reader,
            instance=ids.uuid(),
            operations=dict(spine._operations),
            rules=spine._rules_by_operation(),
            promises=lambda declared: promised(acting, declared),
            calls_most=2 * settings.credits + _TASKS_SPARE,
        )
        completions = Completions(
            deps,
            reader,
            parts,
            spine._publisher,
            Recorder(exchange, ids, coordinator.NAME),
            spine._redeliver,
            settings.retry,
            settings.failpoint,
        )
        contracts = Reconciler(exchange, reader, Recorder(exchange, ids, audit.NAME))
        children = [
            ChildSpec(audit.NAME, lambda: Audit(exchange, writer, reader, contracts, progress)),
            ChildSpec(ROUTER, lambda: Router(exchange)),
            ChildSpec(registry.NAME, lambda: Registry(deps)),
            ChildSpec(coordinator.NAME, lambda: Coordinator(completions)),
        ]
        for child in children:
            exchange.mailbox(child.id)
        self.clock, self.exchange, self.dependencies = settings.clock, exchange, deps
        self.writer, self.reader = writer, reader
        self.supervisor = Supervisor(exchange, ids, children, settings.supervision)
        self.life = Lifecycle(
            settings,
            exchange,
            self.supervisor,
            Watchdog(
                exchange.loop,
                exchange.tracer,
                spine._code_names([*(part.domain for part in parts), spine._publisher]),
                limit_s=settings.blocked_s,
            ),
            writer,
            reader,
            _gauges(deps, completions, progress),
        )


def _gauges(deps: Dependencies, completions: Completions, progress: Progress) -> Gauges:
    clock = deps.exchange.clock
    return Gauges(
        governance=lambda: deps.switch.state.effective(clock.time_us()).to_dict(),
        decisions=lambda: asdict(deps.counts) | {"interrupted": deps.recovery.interrupted},
        transactions=completions.to_dict,
        contracts=lambda: dict(progress.verdicts),
        journal=lambda: progress.to_dict() | deps.to_dict(),
    )
