"""A unit that must not be written fails alone: by its guard, by its epoch, or as no record."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spine.governance.units import Committed, GuardFailed, Record, StaleEpoch, Unit
from spine.journal.domain_rows import GUARD_ROW
from spine.journal.projections import GUARD_DECISION_OPEN, GUARD_GOVERNANCE, GUARD_IDEMPOTENCY, GUARD_RUN
from spine.journal.tx_projections import GUARD_RUN_KNOWN, GUARD_STEP, GUARD_TRANSACTION, GUARD_TRANSACTION_STATE
from spine.journal.verify import verify
from tests.unit.journal_kit import (
    aborted,
    aborting,
    all_committed,
    begun,
    committed,
    decided,
    ended,
    incident,
    reading,
    sql,
    started,
    step,
    switched,
    write,
    writing,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


@pytest.mark.parametrize(
    ("guard", "bad"),
    [
        (GUARD_RUN, [started("taken")]),
        (GUARD_IDEMPOTENCY, [decided("d9", key="taken")]),
        (GUARD_GOVERNANCE, [switched("halted", 3)]),
        (GUARD_TRANSACTION, [begun("other", "taken")]),
        (GUARD_TRANSACTION_STATE, [committed("never begun")]),
        (GUARD_RUN_KNOWN, [begun("of nobody", "nobody"), committed("of nobody", "nobody")]),
        (GUARD_DECISION_OPEN, [ended("never decided")]),
        (GUARD_ROW, [step("taken", 1, rows=[incident("taken")])]),
        (GUARD_STEP, [step("taken")]),
    ],
)
async def test_a_unit_whose_guard_fails_fails_alone(journal_url: str, guard: str, bad: list[Record]) -> None:
    before = [
        Unit("b1", [started("taken")]),
        Unit("b2", [decided("d0", "taken", key="taken")]),
        Unit("b3", [begun("taken", "taken"), step("taken", rows=[incident("taken")])]),
    ]
    good = [Unit("g1", [started("good-1")]), Unit("g2", [started("good-2")])]
    async with writing(journal_url) as writer:
        assert all_committed(await writer.commit(before))
        outcomes = await writer.commit([good[0], Unit("bad", bad), good[1]])
        assert [type(outcome) for outcome in outcomes] == [Committed, GuardFailed, Committed]
        assert outcomes[1] == GuardFailed(guard, 1, 0)
        assert await writer.find_units(["g1", "bad", "g2"], 0) == {"g1": outcomes[0], "g2": outcomes[2]}
    assert verify(journal_url).ok


async def test_of_two_claims_in_one_batch_the_first_wins(journal_url: str) -> None:
    outcomes = await write(
        journal_url,
        [
            Unit("u1", [decided("d1", key="k")]),
            Unit("u2", [decided("d2", key="k")]),
            Unit("u3", [started()]),
            Unit("u4", [started()]),
        ],
    )
    assert outcomes == [
        Committed(1, 1),
        GuardFailed(GUARD_IDEMPOTENCY, 1, 0),
        Committed(2, 2),
        GuardFailed(GUARD_RUN, 1, 0),
    ]


BAD_RECORDS: list[tuple[list[Record], str]] = [
    ([], "without records"),
    ([Record("event", 1, {"event_id": "e"})], "missing field 'n'"),
    ([Record("decision", 1, {"decision_id": "\ud800"})], "surrogates"),
    ([Record("lesson", 1, {"x": object()})], "not JSON serializable"),
    ([Record("lesson", 1, {"x": 2**70})], "exceeds"),
    ([Record("run.denied", 1, {"run_id": 5})], "5 is not text"),
    ([Record("lesson", 1, {"tenant_id": "t", "row": {"id": "1", "sneaky": 1}})], "no column 'sneaky'"),
    ([Record("tx.step", 1, step("t").fields | {"rows": [{"table": "runs", "row": {}}]})], "table 'runs'"),
    ([Record("governance.changed", 1, {"to": "halted", "epoch": "2"})], "governance.changed"),
    ([Record("decision", 1, {"decision_id": "d", "tenant_id": None, "operation": "o", "final": False})], "inst"),
    ([decided("d", tenant_id=None)], "record: "),
]


async def test_units_that_cannot_be_recorded_fail_alone(journal_url: str) -> None:
    units = [Unit("g1", [started("a")])]
    units += [Unit(f"bad-{n}", bad) for n, (bad, _) in enumerate(BAD_RECORDS)]
    first, *outcomes, last = await write(journal_url, [*units, Unit("g2", [started("b")])])
    assert (first, last) == (Committed(1, 1), Committed(2, 2))
    for outcome, (_, reason) in zip(outcomes, BAD_RECORDS, strict=True):
        assert isinstance(outcome, GuardFailed)
        assert outcome.guard.startswith("record: ")
        assert reason in outcome.guard
    assert verify(journal_url).rows == 2


async def test_deep_nesting_is_refused_not_fatal(journal_url: str) -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    outcomes = await write(journal_url, [Unit("bad", [Record("lesson", 1, {"x": deep})]), Unit("g", [started()])])
    assert [type(outcome) for outcome in outcomes] == [GuardFailed, Committed]


async def test_a_decision_under_an_older_epoch_is_not_written(journal_url: str) -> None:
    async with writing(journal_url) as writer:
        units = [
            Unit("u1", [decided("d1")], epoch=1),
            Unit("u2", [switched("halted", 2)], epoch=1),
            Unit("u3", [decided("d2")], epoch=1),
            Unit("u4", [started("free")]),
            Unit("u5", [decided("d3")], epoch=2),
        ]
        assert await writer.commit(units) == [
            Committed(1, 1),
            Committed(2, 2),
            StaleEpoch(2),
            Committed(3, 3),
            Committed(4, 4),
        ]
        assert await writer.commit([Unit("u6", [decided("d4")], epoch=1)]) == [StaleEpoch(2)]
    assert verify(journal_url).rows == 4


async def test_another_process_switch_binds_from_its_commit(journal_url: str) -> None:
    async with writing(journal_url) as ours, writing(journal_url) as theirs:
        assert all_committed(await ours.commit([Unit("u1", [decided("d1")], epoch=1)]))
        assert all_committed(await theirs.commit([Unit("u2", [switched("halted", 2)], epoch=1)]))
        assert await ours.commit([Unit("u3", [decided("d2")], epoch=1)]) == [StaleEpoch(2)]
        assert await ours.commit([Unit("u4", [switched("active", 2)])]) == [GuardFailed(GUARD_GOVERNANCE, 1, 0)]


async def test_a_switch_committed_while_a_batch_waits_for_the_head_binds_it(journal_postgresql_url: str) -> None:
    import psycopg

    async with writing(journal_postgresql_url) as writer:
        assert all_committed(await writer.commit([Unit("u1", [started()])]))
        with psycopg.connect(journal_postgresql_url.replace("+psycopg", "")) as other:
            other.execute("SELECT 1 FROM journal_head FOR UPDATE")
            waiting = asyncio.ensure_future(writer.commit([Unit("u2", [decided("d1")], epoch=1)]))
            await _until_blocked(journal_postgresql_url)
            other.execute("UPDATE journal_head SET size = size + 1, hash = prev.hash FROM journal prev")
            other.execute("UPDATE governance SET epoch = 2")
        assert await waiting == [StaleEpoch(2)]


async def _until_blocked(url: str) -> None:
    """Return once some backend of the database waits for a lock."""
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    while not (await asyncio.to_thread(sql, url, waits))[0][0]:
        await asyncio.sleep(0)


async def test_idempotency_keys_are_claimed_once_and_again_after_an_interruption(journal_url: str) -> None:
    async with writing(journal_url) as writer, reading(journal_url) as reader:
        assert all_committed(await writer.commit([Unit("u1", [decided("d1", key="k")])]))
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert (claim.state, claim.digest, claim.seq_decision, claim.seq_outcome) == ("open", "0" * 64, 1, None)
        lost = ended("d1", key="k", success=False, error_code="INTERRUPTED")
        assert all_committed(await writer.commit([Unit("u2", [lost])]))
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert (claim.state, claim.seq_outcome) == ("interrupted", 2)
        again = [Unit(f"again-{n}", [decided(f"d{n}", key="k", attempt=2)]) for n in (2, 3)]
        assert await writer.commit(again) == [Committed(3, 3), GuardFailed(GUARD_IDEMPOTENCY, 1, 0)]
        assert all_committed(await writer.commit([Unit("u4", [ended("d2", key="k")])]))
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert (claim.state, claim.decision_id, claim.seq_decision, claim.seq_outcome) == ("done", "d2", 3, 4)
    assert verify(journal_url).ok


async def test_another_payload_cannot_take_an_interrupted_key(journal_url: str) -> None:
    lost = ended("d1", key="k", error_code="INTERRUPTED")
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u1", [decided("d1", key="k")]), Unit("u2", [lost])])
        other = decided("d2", key="k", attempt=2, params_digest="1" * 64)
        assert await writer.commit([Unit("u3", [other])]) == [GuardFailed(GUARD_IDEMPOTENCY, 1, 0)]


async def test_a_final_denial_claims_its_key_and_leaves_nothing_open(journal_url: str) -> None:
    await write(journal_url, [Unit("u1", [decided("d1", key="k", final=True, allowed=False)])])
    async with reading(journal_url) as reader:
        claim = await reader.idempotency("acme", "refunds.issue", "k")
        assert claim is not None
        assert claim.state == "denied"
        assert await reader.open_decisions(10**18) == []


async def test_claim_end_and_claim_again_in_one_batch_follow_the_order(journal_url: str) -> None:
    lost = ended("d1", key="k", error_code="INTERRUPTED")
    units = [
        Unit("u1", [decided("d1", key="k")]),
        Unit("u2", [lost]),
        Unit("u3", [decided("d2", key="k", attempt=2)]),
        Unit("u4", [ended("d2", key="k")]),
    ]
    assert all_committed(await write(journal_url, units))
    async with reading(journal_url) as reader:
        claim = await reader.idempotency("acme", "refunds.issue", "k")
    assert claim is not None
    assert (claim.state, claim.decision_id) == ("done", "d2")
    assert verify(journal_url).ok


async def test_an_abort_then_a_new_attempt_commits_the_run(journal_url: str) -> None:
    units = [
        Unit("u1", [started()]),
        Unit("u2", [begun("tx-1"), aborting("tx-1"), aborted("tx-1")]),
        Unit("u3", [begun("tx-2", attempt=2, previous="tx-1"), committed("tx-2")]),
    ]
    assert all_committed(await write(journal_url, units))
    async with reading(journal_url) as reader:
        run, transaction = await reader.run("run-1"), await reader.transaction("run-1", "")
    assert run is not None
    assert (run.state, run.run_status, run.tx_id, run.completed_seq) == ("committed", "succeeded", "tx-2", 6)
    assert transaction is not None
    assert (transaction.attempt, transaction.state, transaction.previous) == (2, "COMMITTED", "tx-1")
    assert verify(journal_url).ok


async def test_a_fenced_commit_changes_nothing(journal_url: str) -> None:
    fenced = committed("tx-1")
    fenced.fields["epoch"] = 7
    async with writing(journal_url) as writer:
        await writer.commit([Unit("u1", [started(), begun("tx-1")])])
        assert await writer.commit([Unit("u2", [fenced])]) == [GuardFailed(GUARD_TRANSACTION_STATE, 1, 0)]
        assert all_committed(await writer.commit([Unit("u3", [committed("tx-1")])]))
