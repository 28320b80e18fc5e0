"""The bridge itself, against a Spine that is only an outside: real threads, loops, forks and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import compat.bridge
from compat.bridge import Bridge
from spine.governance.completion import CompleteRun
from spine.governance.operations import Execute
from spine.kernel.errors import (
    ConfigurationError,
    DeadlineExceeded,
    JournalUnavailable,
    LoopThreadError,
    NotRunning,
    Overloaded,
)
from tests.compat.fakes import Echo, FakeSpine, Silence, running_elsewhere


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.bridge, "GRACE_S", 0.1)
    monkeypatch.setattr(compat.bridge, "LOOK_S", 0.05)
    monkeypatch.setattr(FakeSpine, "started", 0)


@pytest.fixture
def bridge():
    made = Bridge(lambda: FakeSpine)
    yield made
    made.disconnect()


@pytest.fixture
def spine():
    made = FakeSpine()
    with running_elsewhere(made):
        yield made


def script(text: str, **popen: object) -> subprocess.CompletedProcess[str]:
    head = (
        "import os, signal, sys, threading, time, asyncio\n"
        "from compat.bridge import Bridge\n"
        "from spine.kernel.errors import *\n"
        "from tests.compat.fakes import *\n"
        "bridge = Bridge(lambda: FakeSpine)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + text], capture_output=True, text=True, timeout=30, check=False, **popen
    )


class TestAsk:
    def test_the_answer_is_the_answer(self, bridge: Bridge, spine: FakeSpine) -> None:
        answer = object()
        assert bridge.ask(Echo(answer)) is answer

    def test_the_error_is_the_error(self, bridge: Bridge, spine: FakeSpine) -> None:
        error = Overloaded("full")
        with pytest.raises(Overloaded) as caught:
            bridge.ask(Echo(error))
        assert caught.value is error
        assert bridge.ask(Echo(None)) is None

    def test_a_refused_post_reaches_its_caller(self, bridge: Bridge, spine: FakeSpine) -> None:
        assert bridge.ask(Echo(1)) == 1
        spine.post = lambda *a, **k: (_ for _ in ()).throw(Overloaded("no credit"))  # type: ignore[method-assign]
        with pytest.raises(Overloaded, match="no credit"):
            bridge.ask(Echo(2))

    def test_many_threads_get_each_their_own(self, bridge: Bridge, spine: FakeSpine) -> None:
        def work(n: int) -> bool:
            return all(bridge.ask(Echo((n, i))) == (n, i) for i in range(200))

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(work, range(16)))
        assert len(spine.posted) == 3200

    def test_calls_that_wait_together_wake_the_loop_once(self, bridge: Bridge, spine: FakeSpine) -> None:
        assert bridge.ask(Echo(0)) == 0
        loop = spine.loop
        assert loop is not None
        wakes = []
        original = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *a, **k: wakes.append(1) or original(*a, **k)  # type: ignore[method-assign]
        original(time.sleep, 0.3)
        time.sleep(0.05)
        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(lambda n: bridge.ask(Echo(n)), range(8))) == list(range(8))
        assert len(wakes) == 1

    def test_a_connected_spine_goes_before_a_running_one(self, bridge: Bridge, spine: FakeSpine) -> None:
        other = FakeSpine()
        with running_elsewhere(other):
            bridge.connect(spine)
            bridge.ask(Echo("here"))
            assert (spine.posted, other.posted) == (["here"], [])
            bridge.disconnect()
            bridge.ask(Echo("newest"))
            assert other.posted == ["newest"]

    def test_it_follows_a_new_spine(self, bridge: Bridge) -> None:
        for _ in range(2):
            made = FakeSpine()
            with running_elsewhere(made):
                bridge.ask(Echo(1))
            assert made.posted == [1]

    @pytest.mark.parametrize("target", [None, 5, object()])
    def test_what_is_no_target_is_refused(self, bridge: Bridge, target: object) -> None:
        with pytest.raises(ConfigurationError, match=type(target).__name__):
            bridge.connect(target)  # type: ignore[arg-type]

    def test_a_spine_that_is_not_started_is_refused(self, bridge: Bridge) -> None:
        bridge.connect(FakeSpine())
        with pytest.raises(NotRunning, match="start it first"):
            bridge.ask(Echo(1))


class TestLoopThread:
    @pytest.mark.parametrize(
        ("request_", "call"),
        [
            (CompleteRun("r", "t", "s"), "await spine.complete_run(...)"),
            (Execute("a.b", "t"), "await spine.execute(...)"),
        ],
    )
    def test_any_loops_thread_is_refused_with_the_async_call(
        self, bridge: Bridge, spine: FakeSpine, request_: object, call: str
    ) -> None:
        async def main() -> None:
            bridge.ask(request_)  # type: ignore[arg-type]

        with pytest.raises(LoopThreadError) as caught:
            asyncio.run(main())
        assert call in str(caught.value)
        assert spine.posted == []

    def test_the_spines_own_loop_thread_too(self, bridge: Bridge, spine: FakeSpine) -> None:
        async def main() -> None:
            bridge.ask(Echo(1))

        assert spine.loop is not None
        with pytest.raises(LoopThreadError):
            asyncio.run_coroutine_threadsafe(main(), spine.loop).result(5)

    def test_a_thread_beside_a_loop_is_fine(self, bridge: Bridge, spine: FakeSpine) -> None:
        assert asyncio.run(asyncio.to_thread(bridge.ask, Echo(3))) == 3

    def test_a_recording_is_refused_too(self, bridge: Bridge, spine: FakeSpine) -> None:
        async def main() -> None:
            bridge.record(Echo(1))

        with pytest.raises(LoopThreadError):
            asyncio.run(main())


class TestWaiting:
    def test_a_loop_that_does_not_answer_ends_in_deadline(self, bridge: Bridge, spine: FakeSpine) -> None:
        with pytest.raises(DeadlineExceeded, match=r"Echo \(run 'run-1'\) had no answer within 0.2 s"):
            bridge.ask(Echo(Silence()), timeout_s=0.2)
        assert bridge.ask(Echo(1)) == 1
        assert spine.handles[0].cancelled

    def test_what_has_not_started_is_never_sent(self, bridge: Bridge, spine: FakeSpine) -> None:
        assert spine.loop is not None
        spine.loop.call_soon_threadsafe(time.sleep, 0.5)
        time.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            bridge.ask(Echo("abandoned"), timeout_s=0.05)
        assert bridge.ask(Echo("next")) == "next"
        assert spine.posted == ["next"]

    def test_a_late_answer_is_nobody_elses(self, bridge: Bridge, spine: FakeSpine) -> None:
        with pytest.raises(DeadlineExceeded):
            bridge.ask(Echo("late", delay_s=0.4), timeout_s=0.05)
        started = time.monotonic()
        assert bridge.ask(Echo("second", delay_s=0.6)) == "second"
        assert time.monotonic() - started > 0.5

    def test_an_answer_after_many_looks(self, bridge: Bridge, spine: FakeSpine) -> None:
        assert bridge.ask(Echo("slow", delay_s=0.4)) == "slow"

    @pytest.mark.parametrize("stopped", [True, False])
    def test_a_closed_loop_is_told_at_once(self, bridge: Bridge, stopped: bool) -> None:
        made = FakeSpine()
        with running_elsewhere(made) as loop:
            bridge.connect(made)
            assert bridge.ask(Echo(1)) == 1
        assert loop.is_closed()
        made.is_running = not stopped
        started = time.monotonic()
        with pytest.raises(NotRunning, match="not running" if stopped else "is closed"):
            bridge.ask(Echo(2))
        assert time.monotonic() - started < 1

    def test_a_loop_that_closes_while_calls_wait_ends_them(self, bridge: Bridge) -> None:
        made = FakeSpine()
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                bridge.ask(Echo(Silence()))
            except BaseException as error:
                errors.append(error)

        with running_elsewhere(made):
            bridge.connect(made)
            threads = [threading.Thread(target=wait) for _ in range(4)]
            for thread in threads:
                thread.start()
            while len(made.posted) < 4:
                time.sleep(0.01)
        for thread in threads:
            thread.join(5)
        assert [type(error) for error in errors] == [NotRunning] * 4

    def test_a_signal_handler_may_call_while_its_thread_waits(self, bridge: Bridge, spine: FakeSpine) -> None:
        inner: list[object] = []
        before = signal.signal(signal.SIGUSR1, lambda *_: inner.append(bridge.ask(Echo("inner"))))
        try:
            threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            assert bridge.ask(Echo("outer", delay_s=0.5)) == "outer"
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert inner == ["inner"]

    def test_an_interrupted_wake_up_is_made_good_by_the_next_call(self, bridge: Bridge, spine: FakeSpine) -> None:
        bridge.ask(Echo(0))
        loop = spine.loop
        assert loop is not None
        original, interrupts = loop.call_soon_threadsafe, [KeyboardInterrupt()]

        def wake(*arguments: object, **named: object) -> object:
            if interrupts:
                raise interrupts.pop()
            return original(*arguments, **named)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = wake  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            bridge.ask(Echo("interrupted"))
        assert bridge.ask(Echo("next"), timeout_s=1) == "next"
        assert spine.posted == [0, "next"]

    def test_ctrl_c_cancels_and_leaves_at_once(self) -> None:
        done = script(
            "spine = FakeSpine()\n"
            "with running_elsewhere(spine):\n"
            "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
            "    start = time.monotonic()\n"
            "    try:\n"
            "        bridge.ask(Echo(Silence()))\n"
            "    except KeyboardInterrupt:\n"
            "        print('interrupted', time.monotonic() - start < 2)\n"
            "    print(bridge.ask(Echo('after')), spine.handles[0].cancelled)\n"
        )
        assert done.stdout.split() == ["interrupted", "True", "after", "True"], done.stderr


class TestRecord:
    def test_a_recording_problem_is_none_and_logged(
        self, bridge: Bridge, spine: FakeSpine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert bridge.record(Echo(JournalUnavailable("disk full"))) is None
        logged = capsys.readouterr().out
        assert "spine.compat.not_recorded" in logged
        assert "disk full" in logged
        assert "run-1" in logged

    def test_what_is_recorded_is_answered(self, bridge: Bridge, spine: FakeSpine) -> None:
        assert bridge.record(Echo("id")) == "id"

    def test_a_spine_that_cannot_start_is_a_recording_problem(
        self, bridge: Bridge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeSpine, "fail_start", JournalUnavailable("no database"))
        assert bridge.record(Echo(1)) is None

    def test_a_callers_mistake_is_still_raised(self, bridge: Bridge, spine: FakeSpine) -> None:
        with pytest.raises(TypeError):
            bridge.record(Echo(TypeError("wrong")))


class TestOwn:
    def test_started_with_the_first_call_and_once(self, bridge: Bridge) -> None:
        assert FakeSpine.started == 0
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda n: bridge.ask(Echo(n)), range(50))) == list(range(50))
        assert FakeSpine.started == 1

    def test_on_the_url_it_was_connected_to(self, bridge: Bridge) -> None:
        bridge.connect("sqlite:///one.db")
        bridge.ask(Echo(1))
        first = FakeSpine.running()
        assert first is not None
        assert first.url == "sqlite:///one.db"
        bridge.connect("sqlite:///two.db")
        assert first.stopped
        bridge.ask(Echo(1))
        second = FakeSpine.running()
        assert second is not None
        assert second.url == "sqlite:///two.db"

    def test_a_start_that_fails_is_told_and_tried_again(self, bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeSpine, "fail_start", JournalUnavailable("locked"))
        for _ in range(2):
            with pytest.raises(JournalUnavailable, match="locked"):
                bridge.ask(Echo(1))
        monkeypatch.setattr(FakeSpine, "fail_start", None)
        assert bridge.ask(Echo(1)) == 1

    def test_a_spine_started_later_takes_over(self, bridge: Bridge) -> None:
        bridge.ask(Echo("own"))
        made = FakeSpine()
        with running_elsewhere(made):
            bridge.ask(Echo("running"))
        assert made.posted == ["running"]
        bridge.ask(Echo("own again"))
        assert FakeSpine.started == 2

    def test_an_own_one_that_has_stopped_says_so(self, bridge: Bridge) -> None:
        bridge.ask(Echo(1))
        own = FakeSpine.running()
        assert own is not None
        assert own.loop is not None
        asyncio.run_coroutine_threadsafe(own.stop(), own.loop).result(5)
        with pytest.raises(NotRunning):
            bridge.ask(Echo(2))

    def test_stopped_when_the_process_ends(self) -> None:
        done = script(
            "stop = FakeSpine.stop\n"
            "async def told(self):\n"
            "    await stop(self)\n"
            "    print('stopped', flush=True)\n"
            "FakeSpine.stop = told\n"
            "print(bridge.ask(Echo(1)), flush=True)\n"
        )
        assert done.stdout.split() == ["1", "stopped"], done.stderr
        assert done.returncode == 0

    def test_a_stop_that_hangs_does_not_hold_the_process(self) -> None:
        done = script(
            "import compat.bridge\n"
            "compat.bridge.STOP_S = 0.3\n"
            "async def hang(self):\n"
            "    await asyncio.sleep(3600)\n"
            "FakeSpine.stop = hang\n"
            "print(bridge.ask(Echo(1)), flush=True)\n"
        )
        assert done.stdout.split() == ["1"], done.stderr
        assert done.returncode == 0


FORK = (
    "def child(work):\n"
    "    sys.stdout.flush()\n"
    "    pid = os.fork()\n"
    "    if pid == 0:\n"
    "        try:\n"
    "            work()\n"
    "        except BaseException as error:\n"
    "            print('raised', type(error).__name__, error)\n"
    "        sys.stdout.flush()\n"
    "        os._exit(0)\n"
    "    return os.waitpid(pid, 0)[1]\n"
)


class TestFork:
    def test_an_own_spine_is_built_anew_in_the_child(self) -> None:
        done = script(
            FORK + "print(bridge.ask(Echo('parent')))\n"
            "print(child(lambda: print(bridge.ask(Echo('child')), FakeSpine.started)))\n"
            "print(bridge.ask(Echo('parent again')), FakeSpine.started)\n"
        )
        assert done.stdout.splitlines() == ["parent", "child 2", "0", "parent again 2"], done.stderr

    def test_forked_while_other_threads_call(self) -> None:
        done = script(
            FORK + "halt = threading.Event()\n"
            "errors = []\n"
            "def work():\n"
            "    try:\n"
            "        while not halt.is_set(): bridge.ask(Echo(1))\n"
            "    except Exception as error: errors.append(error)\n"
            "threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "for t in threads: t.start()\n"
            "time.sleep(0.1)\n"
            "for n in range(5): assert child(lambda: print('child', bridge.ask(Echo(n)))) == 0\n"
            "halt.set()\n"
            "for t in threads: t.join(5)\n"
            "print('errors', errors)\n"
        )
        assert done.stdout.splitlines() == [*(f"child {n}" for n in range(5)), "errors []"], done.stderr

    @pytest.mark.parametrize("connect", ["bridge.connect(spine)", "bridge.ask(Echo(0))", "pass"])
    def test_a_spine_of_the_program_is_refused_in_the_child(self, connect: str) -> None:
        done = script(
            FORK + "spine = FakeSpine()\n"
            "def work():\n"
            "    try:\n"
            "        bridge.ask(Echo(1))\n"
            "    except NotRunning as error:\n"
            "        print('refused', 'before the process forked' in str(error))\n"
            "    bridge.connect('sqlite:///child.db')\n"
            "    print(bridge.ask(Echo('own')), FakeSpine.running().url)\n"
            "with running_elsewhere(spine):\n"
            f"    {connect}\n"
            "    print(child(work))\n"
            "    print(bridge.ask(Echo('parent')))\n"
        )
        assert done.stdout.splitlines() == ["refused True", "own sqlite:///child.db", "0", "parent"], done.stderr

    def test_a_spine_started_in_the_child_is_used(self) -> None:
        done = script(
            FORK + "spine = FakeSpine()\n"
            "def work():\n"
            "    made = FakeSpine()\n"
            "    with running_elsewhere(made):\n"
            "        print(bridge.ask(Echo('new')), made.posted)\n"
            "with running_elsewhere(spine):\n"
            "    bridge.ask(Echo(0))\n"
            "    print(child(work))\n"
        )
        assert done.stdout.splitlines() == ["new ['new']", "0"], done.stderr
