"""Time and identifiers as ports: the virtual clock, UUIDv7 by RFC 9562, W3C trace ids."""

from __future__ import annotations

import asyncio
import time
import uuid

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spine.kernel.clock import SystemClock, VirtualClock
from spine.kernel.ids import Ids, named

# The signal that pytest-timeout sends by default is lost in an event loop.
pytestmark = pytest.mark.timeout(45, method="thread")

START_US = 1_700_000_000_123_456


@given(st.integers(0, 2**48 * 1000 - 1), st.integers())
def test_a_uuid_has_the_layout_of_version_seven(at_us: int, seed: int) -> None:
    """RFC 9562, section 5.7: 48 bits of unix milliseconds, version 7, variant 10, 74 random bits."""
    text = Ids(VirtualClock(at_us), seed).uuid()
    parsed = uuid.UUID(text)
    assert str(parsed) == text
    assert parsed.int >> 80 == at_us // 1000
    assert parsed.int >> 76 & 0xF == 7
    assert parsed.int >> 62 & 0b11 == 0b10
    assert parsed.variant == uuid.RFC_4122


@given(st.uuids(), st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_named_ids_are_what_the_standard_library_makes(namespace: uuid.UUID, names: list[str]) -> None:
    """RFC 9562, section 5.5: version 5."""
    assert named(str(namespace), names) == [str(uuid.uuid5(namespace, name)) for name in names]


def test_a_namespace_that_is_no_uuid_is_refused() -> None:
    with pytest.raises(ValueError, match="hexadecimal UUID"):
        named("tx-1", ["incidents"])


def test_every_random_bit_of_a_uuid_is_used() -> None:
    ids = Ids(VirtualClock(START_US), 7)
    made = [uuid.UUID(ids.uuid()).int for _ in range(200)]
    free = ((1 << 12) - 1) << 64 | (1 << 62) - 1
    ever_set, always_set = 0, free
    for value in made:
        ever_set |= value & free
        always_set &= value
    assert ever_set == free
    assert always_set & free == 0
    assert len(set(made)) == 200


@pytest.mark.anyio
async def test_uuids_of_later_milliseconds_sort_later() -> None:
    clock = VirtualClock(START_US)
    ids = Ids(clock, 3)
    made = []
    for _ in range(50):
        made.append(ids.uuid())
        await clock.advance(0.001)
    assert made == sorted(made)


@given(st.integers(), st.integers())
def test_the_same_seed_makes_the_same_ids_and_another_seed_others(seed: int, other: int) -> None:
    def some(with_seed: int) -> list[str]:
        ids = Ids(VirtualClock(START_US), with_seed)
        return [ids.uuid(), ids.trace_id(), ids.span_id(), ids.uuid(), str(ids.uniform(0, 1))]

    assert some(seed) == some(seed)
    # random.Random takes a seed by its absolute value.
    assert abs(seed) == abs(other) or some(seed) != some(other)


def test_without_a_seed_no_two_processes_share_ids() -> None:
    clock = VirtualClock(START_US)
    assert Ids(clock).uuid() != Ids(clock).uuid()


@given(st.integers())
def test_trace_and_span_ids_are_lower_case_hex_and_never_all_zero(seed: int) -> None:
    ids = Ids(VirtualClock(), seed)
    for text, length in ((ids.trace_id(), 32), (ids.span_id(), 16)):
        assert len(text) == length
        assert set(text) <= set("0123456789abcdef")
        assert int(text, 16) != 0


def test_the_system_clock_tells_wall_time_in_microseconds() -> None:
    before, told, after = time.time(), SystemClock().time_us(), time.time()
    assert before - 1e-3 <= told / 1e6 <= after + 1e-3


@pytest.mark.anyio
async def test_the_system_clock_does_not_wake_early() -> None:
    clock = SystemClock()
    until = clock.monotonic() + 0.02
    await clock.sleep_until(until)
    assert clock.monotonic() >= until
    await clock.sleep_until(until - 1)


@pytest.mark.anyio
async def test_a_virtual_clock_stands_still_until_it_is_advanced() -> None:
    clock = VirtualClock(START_US)
    woken = []

    async def sleeper() -> None:
        await clock.sleep_until(2.0)
        woken.append(clock.monotonic())

    task = asyncio.ensure_future(sleeper())
    await anyio.wait_all_tasks_blocked()
    await clock.advance(1.999)
    await anyio.wait_all_tasks_blocked()
    assert woken == []
    await clock.advance(0.001)
    await task
    assert woken == [2.0]
    assert clock.time_us() == START_US + 2_000_000


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None)
def test_sleepers_of_a_virtual_clock_wake_at_their_own_moments_in_order(moments: list[int]) -> None:
    """One advance over all of them: each sees its own time, ties in the order in which they lay down."""

    async def scenario() -> None:
        clock = VirtualClock()
        woken: list[tuple[float, int]] = []

        async def sleeper(number: int, moment: float) -> None:
            await clock.sleep_until(moment)
            woken.append((clock.monotonic(), number))

        async with anyio.create_task_group() as group:
            for number, moment in enumerate(moments, start=1):
                group.start_soon(sleeper, number, float(moment) + 1)
            await anyio.wait_all_tasks_blocked()
            await clock.advance(100)
        assert woken == sorted((float(moment) + 1, number) for number, moment in enumerate(moments, start=1))

    anyio.run(scenario)


@pytest.mark.anyio
async def test_a_sleeper_that_lies_down_again_is_woken_within_the_same_advance() -> None:
    clock = VirtualClock()
    beats: list[float] = []

    async def beat() -> None:
        for number in range(1, 6):
            await clock.sleep_until(float(number))
            beats.append(clock.monotonic())

    task = asyncio.ensure_future(beat())
    await anyio.wait_all_tasks_blocked()
    await clock.advance(10)
    await task
    assert beats == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert clock.monotonic() == 10


@pytest.mark.anyio
async def test_a_sleeper_cancelled_on_a_virtual_clock_keeps_nobody_from_waking() -> None:
    clock = VirtualClock()
    gone = asyncio.ensure_future(clock.sleep_until(1.0))
    stays = asyncio.ensure_future(clock.sleep_until(1.0))
    await anyio.wait_all_tasks_blocked()
    gone.cancel()
    await clock.advance(1)
    await asyncio.wait_for(stays, 5)
