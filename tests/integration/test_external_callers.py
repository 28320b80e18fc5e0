"""What the callers of a completion are told: results, errors and conflicts; the same to all who ask for one run."""

from __future__ import annotations

import asyncio
import pickle
from datetime import UTC
from functools import partial
from typing import Any

import anyio
import pytest

from actors.attempts import Attempts
from spine import CompletionConflict, Refused, Spine, TransactionFailed, TransactionResult
from spine.governance.completion import CompleteRun, completion_digest
from tests.governed import authority_fields, intact, journal, query, running, together, until
from tests.participants import (
    BUILT_IN,
    Held,
    Remote,
    Sender,
    World,
    complete,
    failure,
    over,
    raises,
    transactions,
    well,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("often")]


async def test_the_error_of_a_completion_tells_everything_of_it(sqlite_url: str, world: World) -> None:
    """Message, phase, cause, code, domain, partial results with every domain; and it survives pickling."""
    ship = Remote(world, "ship", after=["pay"], forward=raises(ConnectionError("no route")), action="send_parcel")
    spine = over(sqlite_url, Remote(world), ship)
    async with running(spine):
        error = await failure(spine)
    assert isinstance(error.cause, ConnectionError)
    assert error.__cause__ is error.cause
    assert (error.phase, error.code, error.failed_domain) == ("ROLLED_BACK", "ConnectionError", "ship")
    for named in ("run-1", "ship", "ConnectionError", "no route", str(error.transaction_id)):
        assert named in error.message
    assert str(error) == error.message
    assert error.message.count("ConnectionError") == 1
    partial_results = error.partial_results
    assert (partial_results["run_id"], partial_results["phase"]) == ("run-1", "ROLLED_BACK")
    assert partial_results["is_complete"] is False
    assert authority_fields(partial_results["metadata"]) == []
    found = {result.domain: result for result in error.domains}
    assert list(found) == [*BUILT_IN, "pay", "ship"]
    assert not any(result.success for result in error.domains)
    assert (found["ship"].code, found["ship"].error, found["ship"].action) == (
        "ConnectionError",
        "ConnectionError: no route",
        "send_parcel",
    )
    assert (found["pay"].state, found["ship"].state) == ("ROLLED_BACK", "ROLLED_BACK")
    assert found["pay"].result_id == f"pay-{world.effects('forward', 'pay')[0].id}"
    copied = pickle.loads(pickle.dumps(error))
    assert isinstance(copied, TransactionFailed)
    assert copied.domains == error.domains
    assert (copied.message, copied.phase, copied.code) == (error.message, error.phase, error.code)


async def test_the_result_fills_the_fields_that_workers_know(sqlite_url: str, world: World) -> None:
    """Incident, policy and trace results are there beside the domains outside, and survive the record."""
    spine = over(sqlite_url, Remote(world), Sender(world))
    async with running(spine):
        done = await complete(spine, agent_id="a7")
    for name, legacy in zip(BUILT_IN, (done.incident_result, done.policy_result, done.trace_result), strict=True):
        assert legacy is not None
        assert (legacy.domain, legacy.success, legacy.state) == (name, True, "DONE")
        assert legacy.result_id and legacy.timestamp is not None and legacy.timestamp.tzinfo is UTC
    assert (done.phase, done.events_published, done.is_complete) == ("EVENTS_PUBLISHED", ["run.completed"], True)
    assert (done.run_id, done.tenant_id, done.run_status) == ("run-1", "acme", "succeeded")
    assert TransactionResult.from_dict(done.to_dict()) == done
    body = done.to_dict()
    assert (body["incident"]["domain"], body["policy"]["domain"], body["trace"]["domain"]) == BUILT_IN


async def test_the_same_completion_again_gives_the_stored_result_and_asks_nobody(sqlite_url: str, world: World) -> None:
    """Now, and from the next process."""
    spine, other = (over(sqlite_url, Remote(world), Sender(world)) for _ in range(2))
    async with running(spine):
        first = await complete(spine)
        again = await complete(spine)
    async with running(other):
        later = await complete(other)
    assert again.to_dict() == later.to_dict() == first.to_dict() | {"duration_ms": again.duration_ms}
    assert world.told("forward") == ["forward pay"]


async def test_another_payload_under_a_taken_key_is_a_conflict_that_names_both(sqlite_url: str, world: World) -> None:
    """While the first is under way and after it has committed; both digests, the key and the transaction are named."""
    held = Held()
    spine = over(sqlite_url, Remote(world, forward=held))
    digests = [
        completion_digest(CompleteRun(run_id="run-1", tenant_id="acme", run_status=status))
        for status in ("succeeded", "failed")
    ]

    async def conflict() -> None:
        with pytest.raises(CompletionConflict) as raised:
            await complete(spine, status="failed")
        (begun,) = journal(sqlite_url, "tx.begun")
        for named in ("run-1", begun["tx_id"], *(digest[:16] for digest in digests)):
            assert named in str(raised.value)

    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(complete, spine)
        await held.reached.wait()
        other = over(sqlite_url, Remote(world))
        async with running(other):
            with pytest.raises(CompletionConflict, match=digests[1][:16]):
                await complete(other, status="failed")
        held.let_go.set()
        await until(lambda: transactions(sqlite_url) == ["COMMITTED"])
        await conflict()
    assert transactions(sqlite_url) == ["COMMITTED"]
    assert world.told() == ["forward pay"]


async def test_many_who_complete_one_run_at_once_make_one_transaction(database_url: str, world: World) -> None:
    """Five callers on each of two Spines, while the domain takes its time: one transaction, one call, one result."""
    held = Held()
    here, there = (over(database_url, Remote(world, forward=held)) for _ in range(2))
    results: list[TransactionResult] = []

    async def one(spine: Spine) -> None:
        results.append(await complete(spine))

    async with running(here, there), anyio.create_task_group() as group:
        for spine in (here, there) * 5:
            group.start_soon(one, spine)
        with anyio.fail_after(20):
            await held.reached.wait()
            await until(lambda: len(journal(database_url, "tx.begun")) == 1)
            held.let_go.set()
            await until(lambda: len(results) == 10)
    assert len({result.transaction_id for result in results}) == 1
    assert all(result.is_complete for result in results)
    assert len({repr(result.domains) for result in results}) == 1
    assert world.told() == ["forward pay"]
    assert transactions(database_url) == ["COMMITTED"]
    intact(database_url)


@pytest.mark.parametrize(
    ("end", "code"), [("ROLLED_BACK", "NO_FUNDS"), ("ROLLED_BACK", "INTERRUPTED"), ("PARKED", "NO_FUNDS")]
)
async def test_many_who_complete_one_run_at_once_are_told_the_same_failure(
    sqlite_url: str, world: World, end: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five callers on each of two Spines: one attempt, one error for all; who asks after that begins a new attempt.

    So it is too when the domain's own code is the one that the coordinator has for the end of a process.
    """
    reached, let_go, waits = asyncio.Event(), asyncio.Event(), asyncio.Event()
    wait_for = Attempts._wait_for

    async def noted(*arguments: Any) -> None:
        waits.set()
        await wait_for(*arguments)

    async def held_back(do: Any) -> Any:
        reached.set()
        await let_go.wait()
        raise Refused(code, "the account is empty")

    monkeypatch.setattr(Attempts, "_wait_for", noted)
    rollback = well if end == "ROLLED_BACK" else raises(OSError("away"))
    domains = [Remote(world, rollback=rollback), Remote(world, "no", after=["pay"], forward=held_back)]
    here, there = over(sqlite_url, *domains), over(sqlite_url, *domains)
    async with running(here, there):
        callers = [asyncio.ensure_future(failure(spine)) for spine in (here, there) * 5]
        with anyio.fail_after(20):
            await reached.wait()
            # One of each Spine's callers looks after the transaction, the others wait for that one.
            await waits.wait()
            let_go.set()
            errors = await asyncio.gather(*callers)
        assert {(error.phase, error.transaction_id) for error in errors} == {(end, errors[0].transaction_id)}
        assert len({repr(error.domains) for error in errors}) == 1
        for error in errors:
            assert "pay" in error.message or "account is empty" in error.message
        assert world.told("forward") == ["forward pay", "forward no"]
        again = await failure(here)
        assert (again.transaction_id != errors[0].transaction_id) == (end == "ROLLED_BACK")
    assert len(transactions(sqlite_url)) == (2 if end == "ROLLED_BACK" else 1)
    intact(sqlite_url)


async def test_a_hundred_completions_at_once_each_end_their_own_way(database_url: str, world: World) -> None:
    """Every fourth is refused, every fourth loses its reply once, and nobody's end is another's."""
    flaky: dict[str, int] = {}

    async def by_run(do: Any) -> Any:
        run_id = world.calls[-1].effect.run_id
        await asyncio.sleep(0)
        match int(run_id) % 4:
            case 0:
                raise Refused("NO", run_id)
            case 1 if flaky.setdefault(run_id, 0) == 0:
                flaky[run_id] = 1
                do()
                raise ConnectionError(run_id)
            case _:
                return do()

    spine = over(database_url, Remote(world), Remote(world, "ship", after=["pay"], forward=by_run))
    ended: dict[int, str] = {}

    async def one(number: int) -> None:
        try:
            ended[number] = (await complete(spine, str(number))).phase.value
        except TransactionFailed as error:
            ended[number] = str(error.code) if str(number) in str(error) else str(error)

    async with running(spine):
        with anyio.fail_after(40):
            await together(*[partial(one, number) for number in range(100)])
        counts = spine.health().transactions
    refused = {number for number in range(100) if number % 4 == 0}
    assert {number for number, end in ended.items() if end == "NO"} == refused
    assert {end for number, end in ended.items() if number not in refused} <= {"COMMITTED", "EVENTS_PUBLISHED"}
    assert world.standing() == ["pay"] * 75 + ["ship"] * 75
    assert (counts["committed"], counts["aborted"], counts["compensated"]) == (75, 25, 50)
    states = dict(query(database_url, "SELECT state, count(*) FROM transactions GROUP BY state"))
    assert states == {"COMMITTED": 75, "ABORTED": 25}
    intact(database_url)
