"""The one way from blocking code into a Spine's event loop.

A call goes into a queue that wakes the loop once for all that wait in it, and its thread sleeps on a lock of its own
until the loop answers.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import structlog

from compat.host import Host, HostType
from compat.line import Call, Line, closed
from compat.own import OwnSpine
from spine.governance.authority import GovernanceState
from spine.governance.completion import CompleteRun
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.operations import Execute, timeout_problem
from spine.kernel.errors import (
    ActorCrashed,
    ConfigurationError,
    DeadlineExceeded,
    JournalError,
    LoopThreadError,
    MailboxClosed,
    NotRunning,
    Overloaded,
    SpineFailed,
)
from spine.kernel.messages import Request
from spine.requests import governed

R = TypeVar("R")

DEFAULT_TIMEOUT_S: Final = 30.0
# How much longer than its deadline a call waits for the loop to say that the deadline has passed.
GRACE_S: Final = 5.0
# How long a Spine of the shims' own may take to end.
STOP_S: Final = 30.0
# How long a thread sleeps before it looks whether the loop it waits for still exists.
LOOK_S: Final = 0.5

_RECORDING_PROBLEMS: Final = (
    ConfigurationError,
    ActorCrashed,
    DeadlineExceeded,
    JournalError,
    MailboxClosed,
    NotRunning,
    Overloaded,
    SpineFailed,
)

_ASYNC_CALL: Final[dict[type[Request[Any]], str]] = {
    CompleteRun: "await spine.complete_run(...)",
    Execute: "await spine.execute(...)",
    CreatePolicyEvaluation: "await RunGovernanceFacade(spine.ask).create_policy_evaluation(...)",
    EmitLesson: "await RunGovernanceFacade(spine.ask).emit_..._lesson(...)",
}


class Bridge:
    """The process-wide handle behind every shim.

    ``spine_type`` gives the class of Spines, ``loaded`` whether it has been imported at all.
    """

    def __init__(self, spine_type: Callable[[], HostType], *, loaded: Callable[[], bool] = lambda: True) -> None:
        self._spine_type = spine_type
        self._loaded = loaded
        self._local = threading.local()
        self._connected: Host | str | None = None
        self._own: OwnSpine | None = None
        # The own Spine that is being stopped or was stopped last.
        self._leaving: OwnSpine | None = None
        self._line: Line | None = None
        # What ran before a fork, and in the child: the parent's Spine, which it cannot use.
        self._running: Host | None = None
        self._inherited: Host | None = None
        self._ending = False
        self._lock = threading.RLock()
        self._pid = os.getpid()
        os.register_at_fork(before=self._forking, after_in_parent=self._forked_parent, after_in_child=self._forked)
        atexit.register(self._at_exit)

    def connect(self, target: Host | str) -> None:
        """Send every later call to ``target``: a Spine of this process, or the database URL of one of the shims' own.

        An own Spine of another target is stopped. Raises ConfigurationError when ``target`` is neither.
        """
        if not isinstance(target, str) and not callable(getattr(target, "post", None)):
            raise ConfigurationError(
                f"compat.connect() takes a Spine or a database URL, not {type(target).__name__}: {target!r}"
            )
        self._forget(target)

    def disconnect(self) -> None:
        """Undo ``connect`` and stop an own Spine; the next call looks for a target anew."""
        self._forget(None)

    def ask(self, request: Request[R], *, timeout_s: float | None = None) -> R:
        """Send ``request`` through the spine mailbox and wait ``timeout_s`` seconds (default 30) at most for its reply.

        Raises what the asynchronous call raises, LoopThreadError on an event loop's thread, NotRunning without a loop
        to answer, DeadlineExceeded when that loop does not answer.
        """
        _refuse_loop_thread(request)
        if timeout_s is None:
            timeout_s = getattr(request, "timeout_s", DEFAULT_TIMEOUT_S)
            if timeout_problem(timeout_s):
                # The registry refuses it, with a result: that answer is waited for.
                timeout_s = DEFAULT_TIMEOUT_S
        while True:
            try:
                line = self._reach()
            except JournalError as error:
                # An own Spine that cannot open its journal: the worker hears what a running one would say of it.
                ended = governed(request, error)
                if isinstance(ended, BaseException):
                    raise ended from error
                return cast("R", ended)
            call = self._send(line, request, timeout_s)
            if call.error is None:
                return cast("R", call.result)
            if call.pending is None and line.own is not None and line.own is not self._own:
                # The own Spine was stopped around a fork before it took the call: another one takes it.
                continue
            raise call.error

    def _send(self, line: Line, request: Request[Any], timeout_s: float) -> Call:
        """Put one call into the line and wait for its end."""
        local = self._local.__dict__
        # Taken out while in use: a signal handler that calls a shim meanwhile gets another one.
        waiter: threading.Lock | None = local.pop("waiter", None)
        if waiter is None:
            waiter = threading.Lock()
            waiter.acquire()
        call = Call(request, timeout_s, waiter)
        try:
            line.put(call)
            if not waiter.acquire(timeout=LOOK_S):
                _keep_waiting(line, call)
        except BaseException as error:
            # The waiter is not used again: a late answer may still release it.
            line.abandon(call)
            if not isinstance(error, (DeadlineExceeded, NotRunning)):
                raise
            call.result, call.error = _ended(request, error)
        else:
            local["waiter"] = waiter
        return call

    def record(self, request: Request[R]) -> R | None:
        """Like ``ask``, but what cannot be recorded is logged and answered None instead of raised into the worker."""
        try:
            return self.ask(request)
        except _RECORDING_PROBLEMS as error:
            structlog.get_logger("compat").error(
                "spine.compat.not_recorded",
                request=type(request).__name__,
                run_id=getattr(request, "run_id", None),
                error_type=type(error).__name__,
                error=str(error),
            )
            return None

    def _reach(self) -> Line:
        """The line to the target of the moment: the connected one, else the running one, else an own one."""
        line = self._line
        if line is not None:
            host = line.host
            if host.is_running and host.loop is line.loop and (line.settled or line.running() is host):
                return line
        if os.getpid() != self._pid:
            raise NotRunning(
                f"this process ({os.getpid()}) was forked from {self._pid} by something that does not tell Python: the "
                "shims cannot be used in it; fork with os.fork or multiprocessing, or start a new process"
            )
        while True:
            host = self._host()
            loop = host.loop
            own = self._owner(host)
            if loop is not None and host.is_running:
                break
            if own is None or own is self._own:
                raise _not_running(own)
            # It was stopped around a fork just now: the next one is waited for.
        line = self._line
        if line is None or line.host is not host or line.loop is not loop:
            # An own Spine gives way to one that the program starts later, unless it was asked for by its URL.
            settled = own is None or self._connected is not None
            line = self._line = Line(host, loop, own, self._spine_type().running, settled=settled)
        return line

    def _owner(self, host: Host) -> OwnSpine | None:
        """The own Spine that ``host`` is, be it just being stopped."""
        # Whoever stops an own Spine notes it as leaving first: read in this order, one of the two is seen.
        for own in (self._own, self._leaving):
            if own is not None and own.made is host:
                return own
        return None

    def _host(self) -> Host:
        target = self._connected
        if target is None:
            target = self._spine_type().running()
        if target is not None and not isinstance(target, str) and self._owner(target) is None:
            if target is self._inherited:
                raise _inherited()
            return target
        own = self._own
        if own is not None and own.host is not None:
            return own.host
        if target is None and self._inherited is not None:
            raise _inherited()
        return self._own_host(target if isinstance(target, str) else None)

    def _own_host(self, url: str | None) -> Host:
        with self._lock:
            if self._ending:
                raise NotRunning("the process is ending and the shims' own Spine has been stopped")
            own = self._own
            if own is None:
                own = self._own = OwnSpine(self._spine_type(), url)
        try:
            return own.ready(DEFAULT_TIMEOUT_S)
        except BaseException:
            with self._lock:
                if own.failed and self._own is own:
                    self._own = None
            raise

    def _forget(self, target: Host | str | None) -> None:
        with self._lock:
            own = self._leave()
            self._connected = target
            self._line = None
        if own is not None:
            own.stop(STOP_S)

    def _leave(self) -> OwnSpine | None:
        own = self._leaving = self._own
        self._own = None
        return own

    def _forking(self) -> None:
        """Before a fork: note what the child will not have, and end the own Spine, which starts again when needed.

        SQLite forbids it to be carried over: a child that opened the file beside the inherited connections would hold
        none of the locks it believes to hold, and lose commits when the parent closes.
        """
        self._lock.acquire()
        own = self._leave()
        if own is not None:
            own.stop(STOP_S)
        self._running = self._spine_type().running() if self._loaded() else None

    def _forked_parent(self) -> None:
        self._lock.release()

    def _forked(self) -> None:
        """In the child: the parent's threads are gone, and with them its loops; locks may be held by nobody."""
        self._pid = os.getpid()
        self._local = threading.local()
        self._lock = threading.RLock()
        self._line = None
        connected = self._connected
        self._inherited = self._running if connected is None or isinstance(connected, str) else connected

    def _at_exit(self) -> None:
        with self._lock:
            self._ending = True
            own = self._own
        if own is not None:
            own.stop(STOP_S)


def _refuse_loop_thread(request: Request[Any]) -> None:
    """Raise LoopThreadError where waiting would stop the very loop that could answer, or another one."""
    trio = sys.modules.get("trio")
    if asyncio._get_running_loop() is None and (trio is None or not trio.lowlevel.in_trio_run()):
        return
    call = _ASYNC_CALL.get(type(request), "await spine.ask(...)")
    raise LoopThreadError(
        f"{type(request).__name__} was called through a blocking shim on the thread of a running event loop, which it "
        f"would stop: use {call} there, or call the shim in a thread (asyncio.to_thread)"
    )


def _inherited() -> NotRunning:
    return NotRunning(
        f"the Spine of this program was started before the process forked (now {os.getpid()}): its event loop runs in "
        "the parent only. Start a Spine in the child, or call compat.connect(url) there"
    )


def _not_running(own: OwnSpine | None) -> NotRunning:
    if own is not None:
        return NotRunning("the shims' own Spine has stopped: see its crash report in the log, restart the process")
    return NotRunning(
        "the Spine these shims are connected to is not running: start it first (async with spine), or call "
        "compat.connect(...) with another target"
    )


def _keep_waiting(line: Line, call: Call) -> None:
    """Wait on, until the answer or the end of the deadline and its grace; a closed loop ends it at once."""
    end = time.monotonic() + call.timeout_s + GRACE_S - LOOK_S
    while not call.waiter.acquire(timeout=max(0.0, min(LOOK_S, end - time.monotonic()))):
        if line.loop.is_closed():
            raise closed()
        if time.monotonic() >= end:
            run_id = getattr(call.request, "run_id", None)
            raise DeadlineExceeded(
                f"{type(call.request).__name__} (run {run_id!r}) had no answer within {call.timeout_s:g} s "
                f"and {GRACE_S:g} s of grace: the Spine's event loop is blocked or stopped; what has not started is "
                "cancelled, what has is recorded"
            )


def _ended(request: Request[Any], error: DeadlineExceeded | NotRunning) -> tuple[object | None, BaseException | None]:
    """What the asynchronous call gives: for a deadline that has passed a governed ending, else the error."""
    # A loop that does not answer cannot be asked for its state either: unknown means governed.
    ended = governed(request, error, GovernanceState()) if isinstance(error, DeadlineExceeded) else error
    return (None, ended) if isinstance(ended, BaseException) else (ended, None)


def _spine_type() -> HostType:
    from spine.runtime import Spine

    return cast("HostType", Spine)


BRIDGE: Final = Bridge(_spine_type, loaded=lambda: "spine.runtime" in sys.modules)
