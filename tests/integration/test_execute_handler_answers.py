"""What a handler raises or returns becomes a recorded outcome, whatever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, model_serializer

from spine import AuthorityDecision, OperationContext, OperationResult
from tests.governed import intact, journal, query, running
from tests.integration.desk import Desk, sound

pytestmark = pytest.mark.anyio


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text either")


class NotAnException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "name", "text"),
    [
        (ValueError("bad value"), "ValueError", "bad value"),
        (KeyError(), "KeyError", ""),
        (Unprintable(), "Unprintable", ""),
        (ExceptionGroup("several", [ValueError("one")]), "ExceptionGroup", "several"),
        (RuntimeError("a\x00b\ud800"), "RuntimeError", ""),
        (RuntimeError("x" * 1_000_000), "RuntimeError", "xxx"),
        (TimeoutError("its own"), "TimeoutError", "its own"),
        (asyncio.CancelledError(), "CancelledError", "CancelledError"),
        (StopIteration(), "RuntimeError", "StopIteration"),
        (NotAnException("odd"), "NotAnException", "odd"),
        (GeneratorExit(), "GeneratorExit", ""),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, BaseException) else "",
)
async def test_a_handler_that_raises_is_a_recorded_outcome(
    desk: Desk, error: BaseException, name: str, text: str
) -> None:
    """HANDLER_EXCEPTION with the type's name and its text, in result and journal; the Spine goes on."""

    @desk.spine.operation("desk.raise", timeout_s=0.5)
    async def handler(ctx: OperationContext) -> dict[str, Any]:
        raise error

    async with running(desk.spine):
        result = sound(await desk.execute("desk.raise", run_id="run-1", timeout_s=0.5))
        assert result.error_code == f"HANDLER_EXCEPTION:{name}"
        assert text in str(result.error)
        assert sound(await desk.execute()).success
        assert desk.spine.health().restarts == 0
    outcome = journal(desk.url, "outcome")[0]
    assert outcome["error_code"] == f"HANDLER_EXCEPTION:{name}"
    assert len(outcome["error"]) < 5_000
    assert query(desk.url, "SELECT count(*) FROM open_decisions") == [(0,)]
    intact(desk.url)


class Undumpable(BaseModel):
    @model_serializer
    def dump(self) -> dict[str, Any]:
        raise RuntimeError("cannot be dumped")


async def coroutine() -> dict[str, Any]:
    return {}


async def generator() -> Any:
    yield {}


@pytest.mark.parametrize(
    "value",
    [
        lambda: 5,
        lambda: "text",
        lambda: [("a", 1)],
        lambda: True,
        lambda: {1, 2},
        object,
        lambda: dict,
        AuthorityDecision.allow,
        coroutine,
        generator,
        Undumpable,
        lambda: OperationResult.fail(ValueError("an exception, not its text")),  # type: ignore[arg-type]
        lambda: OperationResult.fail("why", ValueError),  # type: ignore[arg-type]
        lambda: OperationResult.ok(["not", "a", "mapping"]),  # type: ignore[arg-type]
        lambda: OperationResult(True, {}, metadata=5),  # type: ignore[arg-type]
    ],
    ids=[
        "int",
        "str",
        "list",
        "bool",
        "set",
        "object",
        "class",
        "decision",
        "coroutine",
        "generator",
        "model",
        "error not text",
        "code not text",
        "data not a mapping",
        "metadata not a mapping",
    ],
)
async def test_a_handler_that_returns_the_wrong_type_fails_and_is_recorded(
    desk: Desk, value: Callable[[], Any]
) -> None:
    """A mapping, a model or an OperationResult made of such: anything else is a failure that says so, never a crash."""

    @desk.spine.operation("desk.wrong")
    async def handler(ctx: OperationContext) -> Any:
        return value()

    async with running(desk.spine):
        result = sound(await desk.execute("desk.wrong"))
        assert not result.success
        assert str(result.error_code).startswith("HANDLER_EXCEPTION:")
        assert desk.spine.health().restarts == 0
    (outcome,) = journal(desk.url, "outcome")
    assert outcome["error_code"] == result.error_code


@pytest.mark.parametrize(
    ("value", "data", "code"),
    [
        (None, {}, None),
        ({}, {}, None),
        ({"a": {1: 2}}, {"a": {1: 2}}, None),
        (OperationResult.ok(), None, None),
        (OperationResult.ok({"a": 1}), {"a": 1}, None),
        (OperationResult.fail("no money", "BROKE"), None, "BROKE"),
        (OperationResult(False, {"left": 1}, "no money"), {"left": 1}, "FAILED"),
    ],
)
async def test_what_a_handler_may_return(desk: Desk, value: Any, data: Any, code: str | None) -> None:
    """Nothing, a mapping, or its own result, whose failure keeps its code and data."""

    @desk.spine.operation("desk.right")
    async def handler(ctx: OperationContext) -> Any:
        return value

    async with running(desk.spine):
        result = sound(await desk.execute("desk.right"))
    assert (result.data, result.error_code) == (data, code)


async def test_a_handler_cannot_forge_the_authority_fields(desk: Desk) -> None:
    """Its own metadata is kept; what names the decision is the Spine's word."""
    forged = {"governance_active": False, "authority_code": "MINE", "decision_id": "mine", "own": 5}

    @desk.spine.operation("desk.forge")
    async def handler(ctx: OperationContext) -> OperationResult:
        return OperationResult(True, {}, metadata=forged, decision=AuthorityDecision.deny("forged"), operation="other")

    async with running(desk.spine):
        result = sound(await desk.execute("desk.forge"), "desk.forge")
    assert result.metadata["own"] == 5
    assert (result.metadata["governance_active"], result.metadata["authority_code"]) == (True, "ALLOWED")
    assert result.metadata["decision_id"] == journal(desk.url, "decision")[0]["decision_id"]
    assert result.decision == AuthorityDecision.allow()
