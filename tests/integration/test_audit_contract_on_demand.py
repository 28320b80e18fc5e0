"""A run's audit contract judged on demand: as of now, on record where that changed something, or with an error."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from spine import ContractError, Spine
from spine.governance.contract import Overall
from spine.governance.units import StorageFailed
from spine.kernel.errors import ActorCrashed, JournalUnavailable
from tests.governed import clock, intact, running
from tests.integration.promises import MAIL, make, report, start, verdicts
from tests.laws.world import kill

pytestmark = pytest.mark.anyio


async def test_on_demand_a_run_is_judged_as_of_now(database_url: str, unswept: None) -> None:
    """What changed nothing leaves no record; what did is recorded once."""
    moments = clock()
    async with running(spine := make(database_url, moments)):
        await start(spine, MAIL)
        for _ in range(2):
            found = await spine.reconcile("run-1")
            assert (found.overall, found.standing) == (Overall.INCOMPLETE, "PENDING")
            assert "mail" in {finding.domain for finding in found.pending}
        assert verdicts(database_url) == []
        await moments.advance(6)
        for _ in range(2):
            found = await spine.reconcile("run-1")
            assert [str(finding) for finding in found.missing] == ["mail/send missing"]
        assert [verdict["overall"] for verdict in verdicts(database_url)] == ["INCOMPLETE"]
    intact(database_url)


async def test_a_run_that_does_not_exist_has_no_contract(database_url: str) -> None:
    async with running(spine := Spine(database_url)):
        with pytest.raises(ContractError, match="'lost' was never started") as told:
            await spine.reconcile("lost")
        assert told.value.code == "UNKNOWN_RUN"
        for hostile in ("", "a\x00b", "x" * 10_000, "\ud800", None, 5):
            with pytest.raises(ContractError, match="run_id") as told:
                await spine.reconcile(hostile)  # type: ignore[arg-type]
            assert told.value.code == "INVALID_PARAMS"


async def test_a_verdict_that_cannot_be_recorded_is_an_error(sqlite_url: str, unswept: None) -> None:
    moments = clock()
    async with running(spine := make(sqlite_url, moments)):
        await start(spine, MAIL)
        await moments.advance(6)
        refuse(spine)
        with pytest.raises(JournalUnavailable, match=r"run 'run-1'.*no space"):
            await spine.reconcile("run-1")
        with pytest.raises(JournalUnavailable, match=r"'mail' reports.*'run-1'.*no space"):
            await report(spine)


def refuse(spine: Spine) -> None:
    """Let the journal take no more records."""
    writer: Any = spine._system.writer

    async def full(units: Any) -> list[StorageFailed]:
        return [StorageFailed("no space left") for _ in units]

    writer.commit = full


async def test_a_question_that_the_audit_actor_crashes_on_is_told(sqlite_url: str) -> None:
    """It is not left without an answer, and asking again gives one."""
    async with running(spine := Spine(sqlite_url)):
        await start(spine)
        reader: Any = spine._system.reader
        read, asked = reader.contract_rows, anyio.Event()

        async def hangs(run_id: str) -> Any:
            reader.contract_rows = read
            asked.set()
            await anyio.sleep_forever()

        reader.contract_rows = hangs
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                with pytest.raises(ActorCrashed, match="audit"):
                    await spine.reconcile("run-1")

            group.start_soon(ask)
            await asked.wait()
            await kill(spine, "audit")
        assert (await spine.reconcile("run-1")).overall is Overall.INCOMPLETE
