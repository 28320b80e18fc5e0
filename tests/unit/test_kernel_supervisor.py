"""The supervisor: ordered start, restarts within the intensity, reverse stop with a receipt for each child."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anyio
import pytest

from spine.kernel.clock import VirtualClock
from spine.kernel.errors import ActorCrashed, ConfigurationError, SpineFailed
from spine.kernel.exchange import Exchange
from spine.kernel.ids import Ids
from spine.kernel.messages import Envelope
from spine.kernel.supervisor import ChildSpec, Policy, Supervisor
from tests.unit.kernel_rig import Kernel, Say, Worker, actor, close_exchanges, ends, exchange, kernel, stop, until

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(45, method="thread")]

QUICK = Policy(intensity=100, backoff_first_s=0.001, backoff_most_s=0.002)


def named(receipts: list[Any]) -> list[tuple[str, str]]:
    return [(receipt.child, receipt.end) for receipt in receipts]


def crash(built: Kernel, name: str = "worker") -> None:
    """Cancelled from outside, as nothing in the actor can prevent."""
    (task,) = [task for task in asyncio.all_tasks() if task.get_name().startswith(f"spine.{name}.")]
    task.cancel()


async def failed(built: Kernel) -> None:
    await until(lambda: isinstance(built.exchange.closed, SpineFailed))


# -- start


class Slow(Worker):
    """Takes its time to become ready."""

    async def start(self) -> None:
        self.log.append(f"{self.name} starts")
        await anyio.sleep(0.02)
        self.log.append(f"{self.name} is ready")


async def test_children_start_in_order_each_ready_before_the_next() -> None:
    async with kernel(actor("a", Slow), actor("b", Slow), actor("c", Slow)) as built:
        assert built.log == [f"{name} {what}" for name in "abc" for what in ("starts", "is ready")]
        assert built.supervisor.states() == dict.fromkeys(["router", "a", "b", "c"], "ready")


async def test_a_child_that_cannot_start_ends_the_start_with_its_own_error_and_stops_the_others() -> None:
    broken = actor("broken", fail_start=ValueError("no key"))
    never = actor("never")
    with pytest.raises(ValueError, match="no key"):
        async with kernel(actor("first"), broken, never):
            pytest.fail("it started")
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not [name for name in names if name.startswith("spine.")]


async def test_children_started_before_a_failed_start_are_stopped_again() -> None:
    own = exchange()
    log: list[str] = []
    kinds = [actor("first"), actor("second"), actor("broken", fail_start=OSError("disk")), actor("never")]
    specs = [ChildSpec(kind.name, lambda kind=kind: kind(own, log)) for kind in kinds]
    supervisor = Supervisor(own, Ids(own.clock, 1), specs)
    with anyio.fail_after(10), pytest.raises(OSError, match="disk"):
        await supervisor.start()
    with anyio.fail_after(10):
        await supervisor.stop(5)
    assert log[:3] == ["first starts", "second starts", "broken starts"]
    assert [line for line in log if line.endswith("stops")] == ["broken stops", "second stops", "first stops"]
    assert "never starts" not in log
    close_exchanges()


async def test_a_child_that_is_not_ready_in_time_is_named() -> None:
    class Hangs(Worker):
        async def start(self) -> None:
            await anyio.sleep_forever()

    with pytest.raises(SpineFailed, match=r"actor 'worker' was not ready within 0\.05 s"):
        async with kernel(Hangs, specs=lambda name, start: ChildSpec(name, start, start_s=0.05)):
            pytest.fail("it started")


async def test_child_specs_are_checked() -> None:
    own = exchange()
    for facts in ({"id": ""}, {"shutdown_s": 0}, {"start_s": -1}):
        with pytest.raises(ConfigurationError, match="needs an id and positive"):
            ChildSpec(**{"id": "a", "start": lambda: None, **facts})  # type: ignore[arg-type]
    spec = ChildSpec("a", lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigurationError, match="two child specs share an id"):
        Supervisor(own, Ids(own.clock), [spec, spec])
    close_exchanges()


# -- crash and restart


async def test_a_crashed_child_comes_back_as_a_new_incarnation_and_its_mailbox_stays() -> None:
    async with kernel(actor("worker"), actor("other"), policy=QUICK) as built:
        first, other = built.newest(), built.newest("other")
        asked = [built.ask("reply", "1"), built.ask("crash", "boom"), built.ask("reply", "2"), built.ask("reply", "3")]
        assert await ends(asked) == ["1", "ActorCrashed", "2", "3"]
        assert built.newest() is not first
        assert built.newest().handled == ["2", "3"]
        assert built.newest("other") is other
        assert built.log == ["worker starts", "other starts", "worker stops", "worker starts"]
        assert built.supervisor.restarted == 1


async def test_the_caller_hears_which_actor_crashed_on_which_message_and_what_follows() -> None:
    async with kernel(policy=QUICK) as built:
        for restart in (1, 2):
            sent = built.exchange.post(Say("crash", "boom"), "worker", timeout_s=5)
            with pytest.raises(ActorCrashed) as caught:
                await built.exchange.answer(sent)
            assert caught.value.actor == "worker"
            assert caught.value.msg_id == built.exchange.tracer.msg_id(sent.number)
            assert caught.value.restart == restart
            assert "RuntimeError: boom" in str(caught.value)


async def test_a_message_that_crashed_its_actor_is_not_given_to_the_next_incarnation() -> None:
    async with kernel(policy=QUICK) as built:
        await ends([built.ask("crash", "poison")])
        await ends([built.ask("reply", "after")])
        assert [made.handled for made in built.made if isinstance(made, Worker)] == [["poison"], ["after"]]


async def test_what_an_actor_had_taken_and_not_answered_fails_with_its_crash() -> None:
    async with kernel(policy=QUICK) as built:
        taken = [built.ask("silence", str(number)) for number in range(3)]
        await until(lambda: len(built.newest().handled) == 3)
        assert await ends([*taken, built.ask("crash")]) == ["ActorCrashed"] * 4
        counts = built.exchange.ledger.counts()
        assert counts.in_flight == 0
        assert counts.ended["failed"] == 4


async def test_the_next_incarnation_may_answer_what_the_crashed_one_had_taken() -> None:
    """An actor that can find out how its work ended overrides ``resume``; what it leaves open fails as usual."""

    class Remembers(Worker):
        async def resume(self, taken: tuple[Envelope, ...], crash: ActorCrashed | None) -> None:
            for envelope in taken:
                if envelope.payload.text == "written":
                    envelope.reply("found")
            await super().resume([envelope for envelope in taken if not envelope.done], crash)

    async with kernel(Remembers, policy=QUICK) as built:
        taken = [built.ask("silence", "written"), built.ask("silence", "lost")]
        await until(lambda: len(built.newest().handled) == 2)
        assert await ends([*taken, built.ask("crash")]) == ["found", "ActorCrashed", "ActorCrashed"]
        await built.restarted(1)
        assert built.exchange.ledger.counts().in_flight == 0


async def test_a_tell_that_crashed_its_actor_is_a_dead_letter() -> None:
    async with kernel(policy=QUICK) as built:
        built.exchange.post(Say("crash"), "worker", timeout_s=5, reply=False)
        await built.restarted(1)
        assert built.exchange.ledger.counts().ended["dead_lettered"] == 1
        assert "worker" in built.exchange.dead_letters[-1].reason


async def test_a_crash_leaves_a_report() -> None:
    async with kernel(policy=QUICK) as built:
        await ends([built.ask("reply", "before")])
        silent = built.ask("silence")
        await until(lambda: len(built.newest().handled) == 2)
        await ends([built.ask("crash", "boom"), silent])
        (report,) = built.supervisor.crashes
        assert report.actor == "worker"
        assert report.error == "RuntimeError: boom"
        assert (report.restart, report.intensity) == (1, 100)
        assert [told.split()[1] for told in report.messages] == ["Say", "Say"]
        assert "Worker" in report.state
        assert [passage.kind for passage in report.ring] == ["Say"] * 3


async def test_crash_reports_are_bounded() -> None:
    async with kernel(policy=QUICK) as built:
        for number in range(20):
            await ends([built.ask("crash", str(number))])
            await built.restarted(number + 1)
        assert len(built.supervisor.crashes) == 16
        assert built.supervisor.crashes[-1].error == "RuntimeError: 19"


async def test_a_child_cancelled_from_outside_has_crashed() -> None:
    async with kernel(policy=QUICK) as built:
        crash(built)
        await built.restarted(1)
        assert await ends([built.ask("reply", "back")]) == ["back"]


async def test_beyond_the_intensity_everything_fails_and_the_children_are_stopped() -> None:
    policy = Policy(intensity=2, period_s=60, backoff_first_s=0.001)
    async with kernel(actor("worker"), actor("other"), policy=policy) as built:
        silent = built.ask("silence", to="other")
        for _ in range(3):
            await ends([built.ask("crash", "boom")])
        await failed(built)
        assert "crashed more than 2 times in 60 s" in str(built.exchange.closed)
        assert "boom" in str(built.exchange.closed)
        assert await ends([silent]) == ["SpineFailed"]
        with pytest.raises(SpineFailed):
            await built.ask()
        await until(lambda: "other stops" in built.log)
        assert built.supervisor.restarted == 2
        assert {child for child, _ in named(await stop(built))} == {"router", "worker", "other"}


async def test_restarts_older_than_the_period_do_not_count() -> None:
    clock = VirtualClock()
    policy = Policy(intensity=1, period_s=5, backoff_first_s=0.01, backoff_most_s=0.01)
    async with kernel(policy=policy, clock=clock) as built:
        for number in range(4):
            asked = built.ask("crash", timeout_s=1000)
            await ends([asked])
            await clock.advance(6)
            await built.restarted(number + 1)
        assert built.exchange.closed is None
        assert await ends([built.ask()]) == ["done"]


async def test_a_restart_waits_for_its_backoff() -> None:
    """Doubled from restart to restart; the child is down meanwhile and its mailbox takes messages."""
    clock = VirtualClock()
    policy = Policy(intensity=10, period_s=1000, backoff_first_s=1, backoff_most_s=100)
    async with kernel(policy=policy, clock=clock) as built:
        for number, first_s in enumerate((1.0, 2.0, 4.0), start=1):
            await ends([built.ask("crash", timeout_s=1000)])
            asked = built.ask("reply", "queued", timeout_s=1000)
            await until(lambda: len(built.exchange.mailboxes["worker"]) == 1)
            await clock.advance(first_s * 0.99)
            assert built.supervisor.states()["worker"] == "stopped"
            assert len(built.exchange.mailboxes["worker"]) == 1
            # The jitter is at most half.
            await clock.advance(first_s * 0.52)
            await built.restarted(number)
            assert await ends([asked]) == ["queued"]


async def test_temporary_and_transient_children_end_without_a_restart() -> None:
    class Ends(Worker):
        async def run(self) -> None:
            if self.name.endswith("crashes"):
                raise RuntimeError("once")

    kinds = {"temporary_crashes": "temporary", "temporary_ends": "temporary", "transient_ends": "transient"}
    async with kernel(
        *[actor(name, Ends) for name in kinds],
        actor("worker"),
        policy=Policy(intensity=0),
        specs=lambda name, start: ChildSpec(name, start, kinds.get(name, "permanent")),  # type: ignore[arg-type]
    ) as built:
        await until(lambda: all(built.supervisor.states()[name] == "stopped" for name in kinds))
        # They did not use up the restarts of the others either: there is none to lose here.
        assert built.exchange.closed is None
        assert built.supervisor.restarted == 0
        assert await ends([built.ask()]) == ["done"]


async def test_a_transient_child_restarts_after_a_crash_and_a_permanent_one_after_any_end() -> None:
    class EndsOnce(Worker):
        ended: list[str] = []

        async def run(self) -> None:
            if self.name not in self.ended:
                self.ended.append(self.name)
                if self.name == "transient":
                    raise RuntimeError("once")
                return
            await super().run()

    kinds = {"transient": "transient", "permanent": "permanent"}
    async with kernel(
        *[actor(name, EndsOnce, ended=EndsOnce.ended) for name in kinds],
        policy=QUICK,
        specs=lambda name, start: ChildSpec(name, start, kinds[name]),  # type: ignore[arg-type]
    ) as built:
        await until(lambda: built.supervisor.restarted == 2)
        assert await ends([built.ask(to="transient"), built.ask(to="permanent")]) == ["done", "done"]


@pytest.mark.parametrize(("strategy", "again"), [("one_for_one", "b"), ("rest_for_one", "bc"), ("one_for_all", "abc")])
async def test_a_strategy_restarts_whom_it_names_in_order(strategy: Any, again: str) -> None:
    policy = Policy(strategy=strategy, intensity=10, backoff_first_s=0.001, backoff_most_s=0.002)
    async with kernel(actor("a"), actor("b"), actor("c"), policy=policy) as built:
        del built.log[:]
        await ends([built.ask("crash", to="b")])
        await until(lambda: sum(line.endswith("starts") for line in built.log) == len(again))
        await until(lambda: set(built.supervisor.states().values()) == {"ready"})
        stopped = [line.split()[0] for line in built.log if line.endswith("stops")]
        started = [line.split()[0] for line in built.log if line.endswith("starts")]
        assert started == list(again)
        assert stopped == ["b", *[name for name in reversed(again) if name != "b"]]
        assert await ends([built.ask(to=name) for name in "abc"]) == ["done"] * 3


async def test_what_a_sibling_had_taken_fails_when_it_is_restarted_along() -> None:
    policy = Policy(strategy="rest_for_one", intensity=10, backoff_first_s=0.001)
    async with kernel(actor("a"), actor("b"), policy=policy) as built:
        taken = built.ask("silence", to="b")
        await until(lambda: built.newest("b").handled)
        assert await ends([built.ask("crash", to="a"), taken]) == ["ActorCrashed", "ActorCrashed"]


async def test_a_sibling_is_never_two_incarnations_at_once() -> None:
    """Its restart waits until the old incarnation has let go."""

    class Lingers(Worker):
        alive = {"now": 0, "most": 0}

        async def start(self) -> None:
            await super().start()
            self.alive["now"] += 1
            self.alive["most"] = max(self.alive.values())

        async def stop(self) -> None:
            await anyio.sleep(0.1)
            self.alive["now"] -= 1
            await super().stop()

    policy = Policy(strategy="one_for_all", intensity=10, backoff_first_s=0.001, backoff_most_s=0.001)
    async with kernel(actor("a"), actor("slow", Lingers), policy=policy) as built:
        await ends([built.ask("crash", to="a")])
        await until(lambda: built.log.count("slow starts") == 2)
        assert Lingers.alive["most"] == 1


async def test_two_children_that_need_each_other_to_start_come_back_together() -> None:
    """The one whose start asks the other does not keep the supervisor from restarting that other one."""

    class Asks(Worker):
        async def start(self) -> None:
            await super().start()
            await self.exchange.ask(Say("reply", "hello"), "served", timeout_s=15)

    policy = Policy(intensity=10, backoff_first_s=0.02, backoff_most_s=10)
    async with kernel(actor("served"), actor("asks", Asks), policy=policy) as built:
        crash(built, "asks")
        await until(lambda: built.supervisor.states()["asks"] != "ready")
        # Its backoff is the second, twice as long: it comes back after the other one has begun to ask.
        crash(built, "served")
        await until(lambda: set(built.supervisor.states().values()) == {"ready"}, seconds=5)


# -- stop


async def test_children_stop_in_reverse_and_each_has_a_receipt() -> None:
    async with kernel(actor("a"), actor("b"), actor("c")) as built:
        receipts = await stop(built)
        assert named(receipts) == [("c", "clean"), ("b", "clean"), ("a", "clean"), ("router", "clean")]
        assert [line for line in built.log if "stops" in line] == ["c stops", "b stops", "a stops"]
        assert set(built.supervisor.states().values()) <= {"stopped", "ready"}


class Stubborn(Worker):
    """Does not stop when told to; ends when cancelled, unless it swallows that too."""

    swallows = False
    release: asyncio.Event

    async def run(self) -> None:
        type(self).release = asyncio.Event()
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                if not self.swallows:
                    raise


async def test_a_child_that_does_not_stop_is_cancelled_and_its_receipt_says_forced() -> None:
    async with kernel(actor("a"), Stubborn, specs=lambda name, start: ChildSpec(name, start, shutdown_s=0.05)) as built:
        began = time.monotonic()
        assert named(await stop(built)) == [("worker", "forced"), ("a", "clean"), ("router", "clean")]
        assert time.monotonic() - began < 2


async def test_a_child_that_cannot_be_cancelled_is_left_behind_and_its_receipt_says_leaked() -> None:
    kind = actor("worker", Stubborn, swallows=True)
    async with kernel(actor("a"), kind, specs=lambda name, start: ChildSpec(name, start, shutdown_s=0.05)) as built:
        began = time.monotonic()
        receipts = await stop(built)
        kind.release.set()
        assert named(receipts) == [("worker", "leaked"), ("a", "clean"), ("router", "clean")]
        assert time.monotonic() - began < 4


async def test_the_stop_has_one_deadline_over_all_children() -> None:
    """Ten children that do not stop, each allowed five seconds, do not take fifty."""
    kinds = [actor(f"child{number}", Stubborn) for number in range(10)]
    async with kernel(*kinds) as built:
        began = time.monotonic()
        receipts = await stop(built, 0.3)
        assert time.monotonic() - began < 3
        assert named(receipts) == [*[(f"child{n}", "forced") for n in reversed(range(10))], ("router", "clean")] or {
            end for child, end in named(receipts) if child != "router"
        } == {"forced"}
        assert len(receipts) == 11


async def test_a_child_that_is_down_when_the_stop_comes_has_its_receipt_and_is_not_started_again() -> None:
    """Its backoff ends while another child is still being stopped."""
    policy = Policy(backoff_first_s=0.1, backoff_most_s=0.1)
    async with kernel(
        actor("a"),
        actor("slow", Stubborn),
        policy=policy,
        specs=lambda name, start: ChildSpec(name, start, shutdown_s=0.5),
    ) as built:
        crash(built, "a")
        await until(lambda: built.supervisor.states()["a"] == "stopped")
        assert named(await stop(built)) == [("slow", "forced"), ("a", "clean"), ("router", "clean")]
        assert built.log.count("a starts") == 1


async def test_a_stop_while_a_child_is_starting_again_keeps_its_deadline() -> None:
    class HangsLater(Worker):
        starts = 0

        async def start(self) -> None:
            type(self).starts += 1
            if self.starts > 1:
                await anyio.sleep_forever()

    async with kernel(actor("a"), HangsLater, policy=QUICK) as built:
        crash(built)
        await until(lambda: HangsLater.starts == 2)
        began = time.monotonic()
        receipts = await stop(built, 0.5)
        assert time.monotonic() - began < 3
        assert [child for child, _ in named(receipts)] == ["worker", "a", "router"]
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("spine.worker")]


async def test_a_second_stop_gives_the_same_receipts() -> None:
    async with kernel(Stubborn, specs=lambda name, start: ChildSpec(name, start, shutdown_s=0.05)) as built:
        first = list(await stop(built))
        assert named(first) == [("worker", "forced"), ("router", "clean")]
        assert await built.supervisor.stop(1) == first


async def test_a_supervisor_that_was_never_started_stops_at_once() -> None:
    own = exchange()
    assert await Supervisor(own, Ids(own.clock), []).stop(5) == []
    close_exchanges()


async def test_the_actor_loop_lets_others_run_however_full_its_mailbox_is() -> None:
    """A flood does not keep the event loop from turning."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with kernel(credits=4096) as built:
        own: Exchange = built.exchange
        calls = [own.post(Say("reply", "x"), "worker", timeout_s=10) for _ in range(4000)]
        turning = asyncio.ensure_future(turn())
        await asyncio.gather(*[call.reply_to for call in calls])
        turning.cancel()
        # 4000 messages in batches of 256, through two actors.
        assert turns >= 15
