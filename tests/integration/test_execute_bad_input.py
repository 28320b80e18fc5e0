"""Input that ``execute``, ``start_run`` and ``complete_run`` cannot take is refused by name and recorded."""

from __future__ import annotations

import math
from typing import Any

import anyio
import pytest

from spine import TransactionFailed
from tests.governed import authority_fields, intact, journal, query, running
from tests.integration.desk import Desk, sound

pytestmark = pytest.mark.anyio

BAD_IDS: list[Any] = [
    "",
    "   ",
    "\n",
    "a\x00b",
    "a\ud800b",
    "a\nb",
    "a\x1b[31m",
    "x" * 10_000,
    5,
    b"acme",
    ["acme"],
    {},
]


async def test_an_unknown_operation_is_a_recorded_denial(desk: Desk) -> None:
    """UNKNOWN_OPERATION, whatever was asked for: one final decision, no outcome, nothing ran."""
    names: list[Any] = ["desk.steal", "", "desk", " ", None, 5, ["desk.quick"], "a\x00.b", "\ud800.b", "x." * 5_000]
    async with running(desk.spine):
        for name in names:
            result = sound(await desk.execute(name, run_id="run-1"))
            assert result.error_code == "UNKNOWN_OPERATION", name
        assert sound(await desk.execute()).success
    *unknown, _ = journal(desk.url, "decision")
    assert len(unknown) == len(names)
    for decision in unknown:
        assert (decision["code"], decision["final"]) == ("UNKNOWN_OPERATION", True)
        assert len(decision["operation"]) <= 200
    assert len(journal(desk.url, "outcome")) == 1
    intact(desk.url)


@pytest.mark.parametrize("field", ["tenant_id", "run_id", "idempotency_key"])
async def test_an_id_that_cannot_be_one_is_a_recorded_denial(desk: Desk, field: str) -> None:
    """INVALID_PARAMS names the field; the record holds no such id, and no run begins."""
    async with running(desk.spine):
        for value in BAD_IDS:
            result = sound(await desk.execute(**{field: value}))
            assert result.error_code == "INVALID_PARAMS", value
            assert field in str(result.error), value
    decisions = journal(desk.url, "decision")
    assert len(decisions) == len(BAD_IDS)
    for decision in decisions:
        assert (decision["code"], decision["run_id"], decision["key"]) == ("INVALID_PARAMS", None, None)
        assert decision["tenant_id"] == (None if field == "tenant_id" else "acme")
    assert query(desk.url, "SELECT count(*) FROM runs") == [(0,)]
    assert desk.entered == 0
    intact(desk.url)


async def test_a_timeout_that_cannot_be_one_is_a_recorded_denial(desk: Desk) -> None:
    """INVALID_PARAMS names timeout_s, in good time."""
    async with running(desk.spine):
        for value in (0, -1, math.nan, math.inf, "5", None, True, 10**12):
            with anyio.fail_after(5):
                result = sound(await desk.execute(timeout_s=value))
            assert result.error_code == "INVALID_PARAMS", value
            assert "timeout_s" in str(result.error), value
    assert desk.entered == 0


async def test_every_wrong_id_of_a_call_is_named(desk: Desk) -> None:
    """All of them in one answer."""
    async with running(desk.spine):
        result = sound(await desk.execute(tenant_id="", run_id=5, idempotency_key="\x00", timeout_s=-1))
    for field in ("tenant_id", "run_id", "idempotency_key", "timeout_s"):
        assert field in str(result.error)


@pytest.mark.parametrize("field", ["run_id", "tenant_id", "agent_id"])
async def test_a_start_with_a_wrong_id_is_denied_and_recorded(desk: Desk, field: str) -> None:
    """A denial is returned, names the field, and is in the journal without what cannot be stored."""
    async with running(desk.spine):
        for value in BAD_IDS:
            decision = await desk.spine.start_run(**{"run_id": "run-1", "tenant_id": "acme", field: value})
            assert (decision.allowed, decision.code) == (False, "INVALID_PARAMS"), value
            assert field in decision.reason, value
    denials = journal(desk.url, "run.denied")
    assert len(denials) == len(BAD_IDS)
    for denied in denials:
        assert denied[field] is None
        assert authority_fields(denied) == []
    assert query(desk.url, "SELECT count(*) FROM runs") == [(0,)]
    intact(desk.url)


async def test_a_start_with_a_wrong_expectation_is_denied(desk: Desk) -> None:
    """Promises are (domain, action, seconds); a wrong one refuses the start and says what it should be."""
    wrong: list[Any] = [
        5,
        "abc",
        (),
        ("domain", "action"),
        ("domain", "action", 5, 6),
        ("", "action", 5),
        ("domain", None, 5),
        ("domain", "action", 0),
        ("domain", "action", math.nan),
        ("domain", "action", "5"),
        ("domain", "a\x00", 5),
    ]
    async with running(desk.spine):
        for expectation in wrong:
            decision = await desk.spine.start_run("run-1", tenant_id="acme", expectations=[expectation])
            assert (decision.allowed, decision.code) == (False, "INVALID_PARAMS"), expectation
            assert "expectation" in decision.reason, expectation
        assert (await desk.spine.start_run("run-1", tenant_id="acme", expectations=[("domain", "action", 5)])).allowed


async def test_a_start_with_more_expectations_than_are_taken_is_denied(desk: Desk) -> None:
    """Each is judged anew at every report; the denial names both numbers, and the most that are taken start a run."""
    own = [(f"domain-{n}", "action", 5.0) for n in range(201)]
    async with running(desk.spine):
        for most in ([*own], [own[0]] * 5_000, [None] * 5_000):
            decision = await desk.spine.start_run("run-1", tenant_id="acme", expectations=most)  # type: ignore[arg-type]
            assert (decision.allowed, decision.code) == (False, "INVALID_PARAMS")
            assert f"expectations: {len(most)} are too many, at most 200 are taken" in decision.reason
        assert (await desk.spine.start_run("run-1", tenant_id="acme", expectations=own[:200])).allowed


async def test_a_completion_with_a_wrong_field_fails_naming_it(desk: Desk) -> None:
    """TransactionFailed with INVALID_PARAMS before anything begins, in good time; the run can still be completed."""
    wrong: list[tuple[str, Any]] = [
        *((field, value) for field in ("run_id", "tenant_id", "run_status") for value in BAD_IDS),
        ("agent_id", "\x00"),
        ("agent_id", 5),
        ("error_code", "\ud800"),
        ("error_code", 5),
        ("error_message", "\x00"),
        ("error_message", "\ud800"),
        ("error_message", "x" * 100_000),
        ("error_message", ValueError("x")),
        ("completion_key", "\x00"),
        ("completion_key", 5),
        ("completion_key", None),
    ]
    call: dict[str, Any] = {"run_id": "run-1", "tenant_id": "acme", "run_status": "succeeded"}
    async with running(desk.spine):
        for field, value in wrong:
            with anyio.fail_after(5), pytest.raises(TransactionFailed, match=field) as failure:
                await desk.spine.complete_run(**{**call, field: value})
            assert (failure.value.code, failure.value.phase) == ("INVALID_PARAMS", "NOT_STARTED"), (field, value)
        assert journal(desk.url, "tx.begun") == []
        assert (await desk.spine.complete_run(**call)).is_complete
