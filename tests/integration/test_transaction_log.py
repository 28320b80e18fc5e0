"""The log of a completion: every phase and every move of a step, under the message that asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from spine import Effect, Refused, RollbackNotSupportedError, Settings, Spine, TransactionFailed
from tests.governed import Published, journal, running

pytestmark = pytest.mark.anyio


class Payments:
    name, after = "payments", ("policies",)
    timeout_s, attempts = 5.0, 1

    async def forward(self, effect: Effect) -> Mapping[str, Any]:
        if effect.run_id == "run-2":
            raise Refused("NO_CREDIT", "the account is empty")
        return {"id": "payment-1"}

    async def rollback(self, effect: Effect) -> None:
        pass


class Irreversible:
    name, after = "mail", ()
    timeout_s, attempts = 5.0, 1

    async def forward(self, effect: Effect) -> Mapping[str, Any]:
        raise AssertionError("it must never be asked")


def phases(logs: list[Any]) -> list[tuple[str, str | None]]:
    return [
        (line["event"].removeprefix("spine.transaction."), line.get("move"))
        for line in logs
        if line["event"].startswith("spine.transaction.")
    ]


async def test_every_phase_of_a_completion_is_logged_with_its_message(sqlite_url: str) -> None:
    """Begun, each move of the domain outside, committed, published: all carry the ids of the one request."""
    spine = Spine(sqlite_url, domains=[Payments()], publisher=Published(), settings=Settings(trace="decisions"))
    async with running(spine):
        with capture_logs() as logs:
            done = await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
    lines = [line for line in logs if line["event"].startswith("spine.transaction.")]
    assert phases(logs) == [
        ("begun", None),
        ("step", "intend"),
        ("step", "done"),
        ("committed", None),
        ("published", None),
    ]
    assert {line["tx_id"] for line in lines} == {done.transaction_id}
    assert {line["run_id"] for line in lines} == {"run-1"}
    for name in ("trace_id", "msg_id", "correlation_id"):
        assert len({line[name] for line in lines}) == 1


async def test_a_rolled_back_completion_logs_the_refusal_and_each_rollback(sqlite_url: str) -> None:
    """The failing domain and its error are in the line that ends it."""
    spine = Spine(sqlite_url, domains=[Payments()], settings=Settings(trace="decisions"))
    async with running(spine):
        with capture_logs() as logs, pytest.raises(TransactionFailed):
            await spine.complete_run("run-2", tenant_id="acme", run_status="succeeded")
    assert phases(logs) == [
        ("begun", None),
        ("step", "intend"),
        ("step", "refused"),
        ("step", "undo"),
        ("step", "undone"),
        ("aborted", None),
    ]
    (ended,) = [line for line in logs if line["event"] == "spine.transaction.aborted"]
    assert (ended["failed_domain"], ended["error"]) == ("payments", "the account is empty")


async def test_a_completion_that_could_not_be_undone_is_refused_on_the_record_before_anything_happened(
    sqlite_url: str,
) -> None:
    """Log and journal hold the refusal, the run is open, and ``why`` says what is in the way."""
    spine = Spine(sqlite_url, domains=[Irreversible()], settings=Settings(trace="decisions"))
    async with running(spine):
        with capture_logs() as logs, pytest.raises(RollbackNotSupportedError, match="'mail'"):
            await spine.complete_run("run-1", tenant_id="acme", run_status="succeeded")
        why = await spine.why("run-1")
    assert phases(logs) == [("refused", None)]
    assert [body["kind"] for body in journal(sqlite_url)] == ["run.started", "ack", "tx.refused"]
    assert (why.verdict, why.cause.code) == ("pending", "ROLLBACK_NOT_SUPPORTED")
    assert "'mail'" in why.cause.text
