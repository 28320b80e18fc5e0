"""The mailbox: bounded lanes, a doorbell that loses nothing, the black box's ring."""

from __future__ import annotations

import asyncio
from collections import deque

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spine.kernel.errors import MailboxClosed, Overloaded
from spine.kernel.mailbox import RING, Mailbox
from spine.kernel.messages import Envelope, Lane
from tests.unit.kernel_rig import Say, envelope

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = pytest.mark.timeout(45, method="thread")


def emptied(mailbox: Mailbox) -> list[int]:
    numbers = []
    while (taken := mailbox.take()) is not None:
        numbers.append(taken.number)
    return numbers


def test_lanes_are_drained_control_first_then_internal_then_ingress() -> None:
    mailbox = Mailbox("m", capacity=8)
    for number, lane in enumerate([Lane.INGRESS, Lane.INTERNAL, Lane.CONTROL, Lane.INGRESS, Lane.CONTROL], start=1):
        mailbox.put(envelope(number, lane))
    assert emptied(mailbox) == [3, 5, 2, 1, 4]
    mailbox.close()


def test_a_control_message_overtakes_what_was_put_before_it() -> None:
    """The lanes are looked at anew for each message, not once a drain."""
    mailbox = Mailbox("m", capacity=8)
    for number in (1, 2, 3):
        mailbox.put(envelope(number, Lane.INGRESS))
    assert mailbox.take().number == 1
    mailbox.put(envelope(9, Lane.CONTROL))
    assert emptied(mailbox) == [9, 2, 3]
    mailbox.close()


@given(
    st.lists(
        st.one_of(st.sampled_from(list(Lane)), st.none()),
        max_size=60,
    ),
    st.integers(1, 4),
)
def test_a_mailbox_behaves_as_three_bounded_queues(steps: list[Lane | None], capacity: int) -> None:
    """Any order of puts and takes: nothing lost, nothing doubled, first in first out within a lane, bound kept."""
    mailbox = Mailbox("m", capacity=capacity)
    model: list[deque[Envelope]] = [deque(), deque(), deque()]
    for number, lane in enumerate(steps):
        if lane is None:
            expected = next((queue.popleft() for queue in model if queue), None)
            assert mailbox.take() is expected
        elif len(model[lane]) == capacity:
            with pytest.raises(Overloaded):
                mailbox.put(envelope(number, lane))
        else:
            sent = envelope(number, lane)
            mailbox.put(sent)
            model[lane].append(sent)
        assert len(mailbox) == sum(map(len, model))
        assert mailbox.depth == [len(queue) for queue in model]
    assert mailbox.close() == [sent for queue in model for sent in queue]


def test_a_full_lane_refuses_by_name_and_leaves_the_others_open() -> None:
    mailbox = Mailbox("registry", capacity=2)
    for number in (1, 2):
        mailbox.put(envelope(number, Lane.INGRESS))
    with pytest.raises(Overloaded, match=r"'registry' holds 2 messages in lane INGRESS"):
        mailbox.put(envelope(3, Lane.INGRESS))
    mailbox.put(envelope(4, Lane.CONTROL))
    assert emptied(mailbox) == [4, 1, 2]
    mailbox.close()


def test_a_closed_mailbox_gives_back_what_it_held_and_takes_no_more() -> None:
    mailbox = Mailbox("audit", capacity=4)
    for number, lane in ((1, Lane.INGRESS), (2, Lane.CONTROL)):
        mailbox.put(envelope(number, lane))
    assert [left.number for left in mailbox.close()] == [2, 1]
    with pytest.raises(MailboxClosed, match="'audit' is closed"):
        mailbox.put(envelope(3))
    assert mailbox.close() == []


@pytest.mark.anyio
async def test_an_actor_waits_on_the_doorbell_and_wakes_for_every_lane() -> None:
    mailbox = Mailbox("m", capacity=4)
    for lane in Lane:
        waiting = asyncio.ensure_future(mailbox.wait())
        await anyio.wait_all_tasks_blocked()
        assert not waiting.done()
        mailbox.put(envelope(int(lane), lane))
        await asyncio.wait_for(waiting, 5)
        assert emptied(mailbox) == [lane]
    mailbox.close()


@pytest.mark.anyio
async def test_the_doorbell_rings_for_what_came_before_the_wait() -> None:
    mailbox = Mailbox("m", capacity=4)
    mailbox.put(envelope(1))
    await asyncio.wait_for(mailbox.wait(), 5)
    assert emptied(mailbox) == [1]
    mailbox.close()


@pytest.mark.anyio
async def test_an_actor_cancelled_at_the_doorbell_loses_no_message() -> None:
    """Cancelled natively in the very step in which the bell was rung: the next one to wait finds everything."""
    mailbox = Mailbox("m", capacity=64)
    for round_ in range(20):
        waiting = await at_the_door(mailbox)
        mailbox.put(envelope(round_))
        waiting.cancel()
        await asyncio.wait([waiting])
        # A new incarnation drains first and waits afterwards.
        assert emptied(mailbox) == [round_]
        after = await at_the_door(mailbox)
        mailbox.put(envelope(1000 + round_))
        await asyncio.wait_for(after, 5)
        assert emptied(mailbox) == [1000 + round_]
    mailbox.close()


async def at_the_door(mailbox: Mailbox) -> asyncio.Future[None]:
    """An actor that waits."""
    waiting = asyncio.ensure_future(mailbox.wait())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    return waiting


@pytest.mark.anyio
async def test_no_wake_up_is_lost_between_puts_takes_and_waits() -> None:
    """A consumer that drains and waits, beside producers that stop at random points, sees every message."""
    mailbox = Mailbox("m", capacity=1000)
    seen: list[int] = []

    async def consume() -> None:
        while len(seen) < 600:
            seen.extend(emptied(mailbox))
            if len(seen) < 600:
                await mailbox.wait()

    async def produce(first: int) -> None:
        for number in range(first, first + 200):
            mailbox.put(envelope(number, Lane(number % 3)))
            if number % 7 == first % 7:
                await anyio.lowlevel.checkpoint()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            for first in (0, 1000, 2000):
                group.start_soon(produce, first)
    assert sorted(seen) == [*range(200), *range(1000, 1200), *range(2000, 2200)]
    mailbox.close()


def test_the_ring_remembers_the_last_envelopes_even_when_they_are_gone() -> None:
    mailbox = Mailbox("m", capacity=500)
    for number in range(RING + 10):
        mailbox.put(envelope(number, sender=f"caller {number}", payload=Say()))
    emptied(mailbox)
    remembered = mailbox.passages()
    assert [passage.number for passage in remembered] == list(range(10, RING + 10))
    last = remembered[-1]
    assert (last.kind, last.sender, last.lane) == ("Say", f"caller {RING + 9}", "INTERNAL")
    mailbox.close()


def test_the_ring_keeps_no_payload() -> None:
    """What it remembers can be logged as it is: nothing secret, nothing kept alive."""
    mailbox = Mailbox("m", capacity=4)
    mailbox.put(envelope(1, payload=Say("reply", "4111-1111-1111-1111")))
    assert "4111" not in repr(mailbox.passages())
    assert "4111" not in repr(mailbox._ring)
    mailbox.close()
