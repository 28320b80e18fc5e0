"""Admission and the one end: credits, turns, deadlines, replies that come twice, late or never."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spine.kernel.clock import VirtualClock
from spine.kernel.errors import (
    ConfigurationError,
    DeadlineExceeded,
    MailboxClosed,
    NotRunning,
    Overloaded,
    SpineFailed,
)
from spine.kernel.exchange import ROUTER, Exchange
from spine.kernel.messages import Envelope, Lane
from spine.kernel.supervisor import Policy
from tests.unit.kernel_rig import Say, close_exchanges, ends, exchange, kernel, until

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(45, method="thread")]


@pytest.fixture(autouse=True)
def closed_at_the_end() -> Iterator[None]:
    yield
    close_exchanges()


def admit(own: Exchange, **options: object) -> Envelope:
    """A call from outside; the spine mailbox is emptied behind it, as the router does."""
    sent = own.post(Say("silence"), "worker", timeout_s=30, lane=Lane.INGRESS, **options)  # type: ignore[arg-type]
    own.mailboxes[ROUTER].take()
    return sent


# -- credits


async def test_a_full_ingress_answers_at_once() -> None:
    own = exchange(credits=2)
    first, _ = admit(own), admit(own)
    with pytest.raises(Overloaded, match="all 2 admission credits in use"):
        admit(own)
    assert own.ledger.refused == 1
    own.reply(first, "x")
    admit(own)


async def test_every_kind_of_end_gives_the_credit_back() -> None:
    own = exchange(credits=1)
    for end in (
        lambda e: own.reply(e, "x"),
        lambda e: own.fail(e, ValueError()),
        own.cancel,
        own.expire,
        lambda e: own.dead_letter(e, MailboxClosed("x")),
    ):
        sent = admit(own)
        assert own.credits_in_use == 1
        end(sent)
        assert own.credits_in_use == 0
        if not sent.reply_to.cancelled():
            sent.reply_to.exception()
    assert own.ledger.counts().balanced


async def test_a_second_end_gives_no_second_credit() -> None:
    own = exchange(credits=1)
    sent = admit(own)
    own.cancel(sent)
    own.reply(sent, "late")
    own.fail(sent, ValueError())
    own.expire(sent)
    assert own.credits_in_use == 0
    admit(own)
    with pytest.raises(Overloaded):
        admit(own)


async def test_records_and_control_messages_need_no_credit() -> None:
    own = exchange(credits=1)
    admit(own)
    for lane in (Lane.INTERNAL, Lane.CONTROL):
        own.post(Say(), "worker", timeout_s=1, lane=lane)
    assert own.credits_in_use == 1


async def test_a_nested_call_takes_a_credit_too_and_never_waits_for_one() -> None:
    own = exchange(credits=2)
    parent = admit(own)
    nested = admit(own, parent=parent)
    assert own.credits_in_use == 2
    with pytest.raises(Overloaded):
        admit(own, parent=nested)


async def test_a_message_that_the_mailbox_does_not_take_costs_no_credit() -> None:
    own = exchange(credits=1)
    own.mailboxes[ROUTER].close()
    with pytest.raises(MailboxClosed):
        admit(own)
    assert own.credits_in_use == 0
    assert own.ledger.counts().admitted == 0


# -- waiting in turn


async def test_a_long_line_of_waiting_callers_is_served_first_come_first_served() -> None:
    own = exchange(credits=8)
    held = [admit(own) for _ in range(8)]
    order: list[int] = []

    async def caller(number: int) -> None:
        await own.reserve(30)
        order.append(number)
        await anyio.lowlevel.checkpoint()
        own.reply(admit(own, reserved=True), "x")

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(caller, number)
                await anyio.wait_all_tasks_blocked()
            for envelope in held[:2]:
                own.reply(envelope, "x")
    assert order == list(range(8))
    assert own.credits_in_use == 6


async def test_nobody_overtakes_the_callers_that_wait() -> None:
    """A credit handed to the next in turn is not free for one who comes now, waiting or not."""
    own = exchange(credits=1)
    held = admit(own)
    turn = asyncio.ensure_future(own.reserve(30))
    await anyio.wait_all_tasks_blocked()
    own.reply(held, "x")
    with pytest.raises(Overloaded):
        admit(own)
    await turn
    own.reply(admit(own, reserved=True), "x")
    assert own.credits_in_use == 0


async def test_a_waiter_cancelled_as_its_turn_comes_passes_the_turn_on() -> None:
    """The credit was handed over and the caller cancelled in the same step of the loop: the next one gets it."""
    own = exchange(credits=2)
    held = [admit(own), admit(own)]
    first, second = asyncio.ensure_future(own.reserve(30)), asyncio.ensure_future(own.reserve(30))
    await anyio.wait_all_tasks_blocked()
    own.reply(held[0], "x")
    first.cancel()
    await asyncio.wait_for(second, 5)
    assert first.cancelled()
    own.reply(held[1], "x")
    own.reply(admit(own, reserved=True), "x")
    assert own.credits_in_use == 0


async def test_a_waiter_cancelled_before_its_turn_leaves_the_line() -> None:
    own = exchange(credits=2)
    held = [admit(own), admit(own)]
    first, second = asyncio.ensure_future(own.reserve(30)), asyncio.ensure_future(own.reserve(30))
    await anyio.wait_all_tasks_blocked()
    first.cancel()
    await asyncio.wait([first])
    own.reply(held[0], "x")
    await asyncio.wait_for(second, 5)
    own.reply(held[1], "x")
    own.unreserve()
    assert own.credits_in_use == 0


async def test_waiting_ends_with_its_time_and_costs_nothing() -> None:
    clock = VirtualClock()
    async with kernel(credits=1, clock=clock) as built:
        own = built.exchange
        held = admit(own)
        turn = asyncio.ensure_future(own.reserve(0.5))
        await anyio.wait_all_tasks_blocked()
        await clock.advance(1)
        with pytest.raises(Overloaded, match="no admission credit came free within the deadline"):
            await asyncio.wait_for(turn, 5)
        own.reply(held, "x")
        assert own.credits_in_use == 0
        assert len(own.deadlines) == 0


async def test_not_more_callers_wait_than_there_are_credits() -> None:
    """Every queue has a bound, that of the waiting callers too."""
    own = exchange(credits=2)
    admit(own), admit(own)
    waiting = [asyncio.ensure_future(own.reserve(30)) for _ in range(2)]
    await anyio.wait_all_tasks_blocked()
    with pytest.raises(Overloaded, match="2 callers wait"):
        await own.reserve(30)
    for turn in waiting:
        turn.cancel()
    await asyncio.wait(waiting)


async def test_callers_that_gave_up_waiting_take_no_place_in_the_line() -> None:
    own = exchange(credits=1)
    held = admit(own)
    for _ in range(5):
        impatient = asyncio.ensure_future(own.reserve(30))
        await anyio.wait_all_tasks_blocked()
        impatient.cancel()
        await asyncio.wait([impatient])
    patient = asyncio.ensure_future(own.reserve(30))
    await anyio.wait_all_tasks_blocked()
    assert not patient.done()
    own.reply(held, "x")
    await asyncio.wait_for(patient, 5)
    own.unreserve()
    assert own.credits_in_use == 0


async def test_a_reservation_that_is_not_used_can_be_given_back() -> None:
    own = exchange(credits=1)
    await own.reserve(1)
    assert own.credits_in_use == 1
    waiting = asyncio.ensure_future(own.reserve(30))
    await anyio.wait_all_tasks_blocked()
    own.unreserve()
    await asyncio.wait_for(waiting, 5)
    own.unreserve()
    assert own.credits_in_use == 0


@given(st.lists(st.tuples(st.sampled_from("awecru"), st.integers(0, 6)), max_size=50), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_credits_are_never_lost_and_never_made(steps: list[tuple[str, int]], credits: int) -> None:
    """Any mix of admissions, waits, replies, cancellations and reservations given back leaves the account even."""

    async def scenario() -> None:
        own = exchange(credits=credits)
        open_: list[Envelope] = []
        waits: list[asyncio.Future[None]] = []
        reserved = 0

        async def turn() -> None:
            nonlocal reserved
            await own.reserve(1000)
            reserved += 1

        for step, which in steps:
            match step:
                case "a":
                    free = credits - own.credits_in_use
                    try:
                        open_.append(admit(own))
                    except Overloaded:
                        assert free == 0
                case "w":
                    waits.append(asyncio.ensure_future(turn()))
                    await asyncio.sleep(0)
                case "e" if open_:
                    own.reply(open_.pop(which % len(open_)), "x")
                case "c" if waits:
                    waits.pop(which % len(waits)).cancel()
                case "r" if reserved:
                    reserved -= 1
                    open_.append(admit(own, reserved=True))
                case "u" if reserved:
                    reserved -= 1
                    own.unreserve()
            if which % 2:
                await asyncio.sleep(0)
            assert 0 <= own.credits_in_use <= credits
        await anyio.wait_all_tasks_blocked()
        assert own.credits_in_use == len(open_) + reserved
        # Nobody waits while a credit is free.
        assert own.credits_in_use == credits or not any(not wait.done() for wait in waits)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for envelope in open_:
            own.reply(envelope, "x")
        for _ in range(reserved):
            own.unreserve()
        assert own.credits_in_use == 0
        close_exchanges()

    asyncio.run(scenario())


# -- the one end


async def test_the_first_end_counts_and_a_late_one_is_counted_and_changes_nothing() -> None:
    own = exchange()
    sent = admit(own)
    own.reply(sent, "first")
    own.reply(sent, "second")
    own.fail(sent, ValueError())
    assert await own.answer(sent) == "first"
    counts = own.ledger.counts()
    assert counts.late_replies == 2
    assert counts.ended["replied"] == 1
    assert sum(counts.ended.values()) == counts.admitted == 1


async def test_a_cancelled_caller_ends_its_message_as_cancelled() -> None:
    own = exchange(credits=1)
    sent = admit(own)
    waiting = asyncio.ensure_future(own.answer(sent))
    await anyio.wait_all_tasks_blocked()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert sent.done
    assert own.ledger.counts().ended["cancelled"] == 1
    assert own.credits_in_use == 0


async def test_a_caller_cancelled_as_the_reply_comes_ends_only_once() -> None:
    own = exchange()
    sent = admit(own)
    waiting = asyncio.ensure_future(own.answer(sent))
    await anyio.wait_all_tasks_blocked()
    own.reply(sent, "x")
    waiting.cancel()
    await asyncio.wait([waiting])
    counts = own.ledger.counts()
    assert counts.ended["replied"] + counts.ended["cancelled"] == 1
    assert counts.in_flight == 0


async def test_an_answer_to_a_future_that_the_caller_cancelled_itself_is_an_end_too() -> None:
    own = exchange(credits=1)
    for end in (lambda e: own.reply(e, 1), lambda e: own.fail(e, ValueError()), own.expire):
        sent = admit(own)
        sent.reply_to.cancel()
        end(sent)
        assert own.credits_in_use == 0
    assert own.ledger.counts().ended["cancelled"] == 3


async def test_an_expired_message_tells_where_it_is() -> None:
    clock = VirtualClock()
    async with kernel(clock=clock) as built:
        asked = built.ask("silence", timeout_s=2)
        await until(lambda: built.newest().handled)
        await clock.advance(3)
        with pytest.raises(DeadlineExceeded, match=r"\(Say\) had no reply within its deadline, it is with worker"):
            await asked
        assert built.exchange.ledger.counts().ended["expired"] == 1


async def test_an_expired_message_is_never_handled() -> None:
    """It waited in the mailbox past its deadline; the actor looks at the clock itself, however late the timer is."""
    clock = VirtualClock()
    async with kernel(clock=clock) as built:
        # The timer sleeps until this one's deadline, and this clock does not wake it by itself.
        first = built.ask("silence", "first", timeout_s=0.5)
        await until(lambda: built.newest().handled)
        late, fine = built.ask("reply", "late", timeout_s=1), built.ask("reply", "fine", timeout_s=5)
        await asyncio.sleep(0)
        clock._now = 2.0
        assert await ends([late, fine]) == ["DeadlineExceeded", "fine"]
        assert built.newest().handled == ["first", "fine"]
        assert not first.done()
        first.cancel()


async def test_what_a_mailbox_cannot_take_from_the_router_fails_and_says_why() -> None:
    """Its actor is down and the queue full, or closed for good: the sender hears at once."""
    clock = VirtualClock()
    async with kernel(clock=clock, credits=2, policy=Policy(backoff_first_s=60, backoff_most_s=60)) as built:
        await ends([built.ask("crash")])
        waiting = [built.ask("reply", str(number), timeout_s=1000) for number in range(8)]
        await until(lambda: len(built.exchange.mailboxes["worker"]) == 8)
        with pytest.raises(Overloaded, match="'worker' holds 8 messages in lane INTERNAL"):
            await built.ask()
        await clock.advance(100)
        assert await ends(waiting) == [str(number) for number in range(8)]
        built.exchange.bury(built.exchange.mailboxes["worker"])
        with pytest.raises(MailboxClosed, match="'worker' is closed"):
            await built.ask()
        assert built.exchange.ledger.counts().in_flight == 0
        assert {crash.actor for crash in built.supervisor.crashes} == {"worker"}


async def test_a_nested_message_has_at_most_the_time_left_to_its_parent() -> None:
    clock = VirtualClock()
    own = exchange(clock=clock)
    parent = own.post(Say(), "worker", timeout_s=2, lane=Lane.INGRESS)
    await clock.advance(1.5)
    nested = own.post(Say(), "worker", timeout_s=30, lane=Lane.INGRESS, parent=parent)
    shorter = own.post(Say(), "worker", timeout_s=0.1, lane=Lane.INGRESS, parent=nested)
    record = own.post(Say(), "worker", timeout_s=30, parent=parent)
    assert nested.deadline == parent.deadline == 2
    assert shorter.deadline == pytest.approx(1.6)
    # Started work is recorded even after its caller's deadline.
    assert record.deadline == 31.5


async def test_a_message_carries_the_trace_and_the_cause_of_its_parent() -> None:
    own = exchange()
    parent = own.post(Say(run_id="run-1"), "worker", timeout_s=2)
    child = own.post(Say(run_id="run-1"), "worker", timeout_s=2, parent=parent)
    grandchild = own.post(Say(), "worker", timeout_s=2, parent=child)
    stranger = own.post(Say(), "worker", timeout_s=2)
    told = own.tracer.identity
    assert told(parent)["trace_id"] == told(child)["trace_id"] == told(grandchild)["trace_id"]
    assert told(stranger)["trace_id"] != told(parent)["trace_id"]
    assert told(parent)["causation_id"] is None
    assert told(child)["causation_id"] == told(parent)["msg_id"]
    assert told(grandchild)["causation_id"] == told(child)["msg_id"]
    assert told(child)["correlation_id"] == told(child)["run_id"] == "run-1"


async def test_a_message_to_nobody_becomes_a_dead_letter_and_its_sender_hears_why() -> None:
    async with kernel() as built:
        with pytest.raises(ConfigurationError, match=r"recipient 'nobody'.*use one of \['worker'\]"):
            await built.ask(to="nobody")
        built.exchange.post(Say("tell"), "nobody", timeout_s=1, reply=False)
        await until(lambda: not built.exchange.ledger.open)
        counts = built.exchange.ledger.counts()
        assert counts.ended["failed"] == 1
        assert counts.ended["dead_lettered"] == 1
        assert counts.late_replies == 0
        assert [letter.recipient for letter in built.exchange.dead_letters] == ["nobody", "nobody"]
        assert built.supervisor.crashes == []


async def test_a_tell_ends_handled_or_dead_lettered_and_in_no_other_way() -> None:
    """Nobody waits for it, so it cannot fail, expire or be cancelled: what keeps it from being handled buries it."""
    own = exchange()
    ends_of_an_ask = (lambda e: own.fail(e, ValueError("x")), own.expire)
    for end in ends_of_an_ask:
        end(own.post(Say("tell"), "worker", timeout_s=5, reply=False))
    counts = own.ledger.counts()
    assert counts.ended["dead_lettered"] == 2
    assert counts.in_flight == 0


# -- closing


async def test_a_closed_exchange_takes_no_new_call_but_lets_running_ones_nest_and_record() -> None:
    own = exchange(credits=4)
    parent = admit(own)
    own.close(NotRunning("stopping"))
    with pytest.raises(NotRunning, match="stopping"):
        admit(own)
    with pytest.raises(NotRunning, match="stopping"):
        await own.reserve(1)
    admit(own, parent=parent)
    own.post(Say(), "worker", timeout_s=1)
    assert own.ledger.refused == 2


async def test_closing_ends_the_wait_of_those_who_wait_for_a_credit() -> None:
    own = exchange(credits=1)
    held = admit(own)
    waiting = asyncio.ensure_future(own.reserve(30))
    await anyio.wait_all_tasks_blocked()
    own.close(NotRunning("stopping"))
    with pytest.raises(NotRunning):
        await asyncio.wait_for(waiting, 5)
    own.reply(held, "x")
    assert own.credits_in_use == 0


async def test_when_supervision_failed_everything_in_flight_fails_and_nothing_is_admitted() -> None:
    own = exchange(credits=4)
    calls = [admit(own), own.post(Say(), "worker", timeout_s=1, parent=None)]
    own.close(SpineFailed("the end"))
    assert await ends([call.reply_to for call in calls]) == ["SpineFailed", "SpineFailed"]
    for lane in Lane:
        with pytest.raises(SpineFailed, match="the end"):
            own.post(Say(), "worker", timeout_s=1, lane=lane)
    with pytest.raises(SpineFailed):
        admit(own, parent=calls[0])
    assert own.ledger.counts().in_flight == 0
    assert own.credits_in_use == 0


async def test_the_idle_future_is_told_when_the_last_admitted_call_has_ended() -> None:
    own = exchange(credits=4)
    calls = [admit(own), admit(own)]
    own.post(Say(), "worker", timeout_s=1)
    idle = own.loop.create_future()
    own.on_idle(idle)
    own.reply(calls[0], 1)
    assert not idle.done()
    own.cancel(calls[1])
    assert idle.done()
    again = own.loop.create_future()
    own.on_idle(again)
    assert again.done()


async def test_what_a_mailbox_still_held_is_buried_with_a_reason() -> None:
    own = exchange()
    sent = own.post(Say(), "worker", timeout_s=30)
    own.bury(own.mailboxes[ROUTER])
    with pytest.raises(MailboxClosed, match="'router' stopped before it took the message"):
        await own.answer(sent)
    assert own.ledger.counts().in_flight == 0
