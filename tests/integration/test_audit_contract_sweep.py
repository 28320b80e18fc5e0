"""The sweep of the runtime audit contract: what fell due is judged, once, whatever happens to those who look."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anyio
import pytest

from actors import reconciler
from spine.governance.contract import Overall
from spine.kernel.errors import JournalUnavailable
from tests.governed import clock, intact, journal, query, running, together, until
from tests.integration.promises import HOUR_US, MAIL, SOON, make, named, overtaken, report, start, table, verdicts
from tests.laws.world import kill

pytestmark = pytest.mark.anyio


async def test_a_promise_whose_time_is_over_is_missing_once_it_is_swept(database_url: str) -> None:
    """Seen in the journal, its table, ``why`` and health; the next moment to look is the next deadline."""
    moments = clock()
    spine = make(database_url, moments)
    async with running(spine):
        await start(spine, MAIL)
        assert table(database_url) == [("run-1", "PENDING")]
        await until(lambda: verdicts(database_url), clock=moments)
        (verdict,) = verdicts(database_url)
        (started,) = journal(database_url, "run.started")
        assert (verdict["overall"], verdict["was"], verdict["previous"]) == ("INCOMPLETE", "PENDING", started["seq"])
        assert named(verdict["missing"]) == ["mail/send"]
        assert not (verdict["failed"] or verdict["stale"] or verdict["drift"])
        assert started["at"] + 5_000_000 < verdict["at"] <= started["at"] + 7_000_000
        assert verdict["due_at"] == started["at"] + HOUR_US
        why = (await spine.why("run-1")).to_dict()["contract"]
        assert {entry["domain"]: entry["status"] for entry in why["expectations"]}["mail"] == "missing"
        await until(lambda: spine.health().contracts == {"complete": 0, "incomplete": 1, "stale": 0})
        await moments.advance(3)
    assert table(database_url) == [("run-1", "INCOMPLETE")]
    assert len(verdicts(database_url)) == 1, "what is judged is left alone until its next moment"
    intact(database_url)


async def test_a_promise_kept_in_time_is_never_found(database_url: str) -> None:
    moments = clock()
    spine = make(database_url, moments)
    async with running(spine):
        await start(spine, MAIL)
        await report(spine)
        await moments.advance(8)
        assert (await spine.reconcile("run-1")).missing == ()
    assert table(database_url) == [("run-1", "PENDING")]
    intact(database_url)


async def test_a_run_not_finalised_in_time_is_stale(database_url: str) -> None:
    moments = clock()
    spine = make(database_url, moments)
    async with running(spine):
        await start(spine, SOON)
        await until(lambda: table(database_url) == [("run-1", "STALE")], clock=moments)
        assert named(verdicts(database_url)[-1]["stale"]) == ["orchestrator/finalize_run"]
        await until(lambda: spine.health().contracts["stale"] == 1)
        assert (await spine.why("run-1")).to_dict()["contract"]["overall"] == "STALE"
    intact(database_url)


async def test_what_fell_due_while_everything_was_down_is_found_after_the_start(database_url: str) -> None:
    async with running(spine := make(database_url, clock())):
        for n in range(3):
            await start(spine, SOON, run_id=f"run-{n}")
    later = clock(ahead_s=60)
    async with running(make(database_url, later)):
        await until(lambda: len(verdicts(database_url)) == 3, clock=later)
    assert table(database_url) == [(f"run-{n}", "STALE") for n in range(3)]
    intact(database_url)


async def test_two_spines_that_sweep_one_database_record_each_verdict_once(database_url: str) -> None:
    moments = clock(), clock()
    spines = [make(database_url, each) for each in moments]
    async with running(*spines):
        for n in range(12):
            await start(spines[n % 2], SOON, run_id=f"run-{n}")
        await together(*(lambda each=each: each.advance(7) for each in moments))
        await until(lambda: all(overall == "STALE" for _, overall in table(database_url)), clock=moments[0])
        await together(*(lambda each=each: each.advance(2) for each in moments))
        assert sum(spine.health().contracts["stale"] for spine in spines) == 12
    assert sorted(verdict["run_id"] for verdict in verdicts(database_url)) == sorted(f"run-{n}" for n in range(12))
    intact(database_url)


async def test_a_sweep_that_was_overtaken_between_reading_and_writing_changes_nothing(
    database_url: str, unswept: None
) -> None:
    """The compare-and-set on the row it read: the other verdict stands, and is counted by who made it alone."""
    async with overtaken(database_url, SOON) as (slow, fast):
        assert (await slow.reconcile("run-1")).overall is Overall.STALE
        assert [spine.health().contracts["stale"] for spine in (slow, fast)] == [0, 1]
    assert len(verdicts(database_url)) == 1
    intact(database_url)


async def test_a_sweep_goes_through_every_page_and_past_what_it_cannot_read(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose journal rows are gone is named in the log, and keeps no other from its verdict."""
    monkeypatch.setattr(reconciler, "PAGE", 1)
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        for n in range(5):
            await start(spine, SOON, run_id=f"run-{n}")
        query(sqlite_url, "DELETE FROM journal WHERE run_id = 'run-0'")
        await until(lambda: len(verdicts(sqlite_url)) == 4, clock=moments)
    assert table(sqlite_url) == [(f"run-{n}", "PENDING" if n == 0 else "STALE") for n in range(5)]
    assert "spine.contract.unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("error", [JournalUnavailable("the database is away"), RuntimeError("a bug")])
async def test_a_sweep_that_fails_is_reported_and_the_next_one_comes(
    sqlite_url: str, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        await start(spine, SOON)
        reader: Any = spine._system.reader
        find, failures = reader.due_contracts, []

        async def fails(*args: Any, **more: Any) -> Any:
            if len(failures) < 2:
                failures.append(error)
                raise error
            return await find(*args, **more)

        reader.due_contracts = fails
        await until(lambda: table(sqlite_url) == [("run-1", "STALE")], clock=moments)
    assert len(failures) == 2
    assert str(error) in capsys.readouterr().out


async def test_the_sweep_goes_on_after_a_crash_of_the_audit_actor(sqlite_url: str) -> None:
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        await start(spine, SOON)
        await kill(spine, "audit")
        await until(lambda: table(sqlite_url) == [("run-1", "STALE")], clock=moments)
    intact(sqlite_url)


async def test_a_stop_does_not_wait_for_a_sweep_that_hangs(sqlite_url: str) -> None:
    moments = clock()
    spine = make(sqlite_url, moments)
    await spine.start()
    hanging = anyio.Event()

    async def hangs(*_: Any, **__: Any) -> Any:
        hanging.set()
        await anyio.sleep_forever()

    reader: Any = spine._system.reader
    reader.due_contracts = hangs
    await moments.advance(1)
    await hanging.wait()
    began = time.monotonic()
    receipts = await spine.stop()
    assert {receipt.child: receipt.end for receipt in receipts}["audit"] == "clean"
    assert time.monotonic() - began < 3
    assert [task for task in asyncio.all_tasks() if "contract" in task.get_name()] == []
