"""Operations: declaring them, what is refused, and what a Spine tells about them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from spine import OperationContext, OperationResult, Spine
from spine.kernel.errors import ConfigurationError
from tests.governed import running


async def nothing(ctx: OperationContext) -> Mapping[str, Any]:
    return {}


class Amount(BaseModel):
    cents: int


@pytest.fixture
def spine(sqlite_url: str) -> Spine:
    return Spine(sqlite_url)


# -- declaring


def test_declaring_gives_the_handler_back(spine: Spine) -> None:
    """The decorator does not change what it decorates, so a handler can still be called by its own tests."""
    assert spine.operation("shop.buy")(nothing) is nothing


@pytest.mark.parametrize(
    "name",
    [
        "",
        "shop",
        ".buy",
        "shop.",
        "shop..buy",
        "shop buy",
        "shop.buy\n",
        "sh\x00op.buy",
        "shöp.buy",
        "1.buy",
        "a." + "b" * 200,
    ],
)
def test_a_name_that_is_not_domain_action_is_refused(spine: Spine, name: Any) -> None:
    """Names are domain.action of letters, digits, - and _."""
    with pytest.raises(ConfigurationError, match=r"domain\.action"):
        spine.operation(name)(nothing)
    assert spine.operation_count == 0


@pytest.mark.parametrize("name", [None, 5, b"shop.buy", nothing], ids=["None", "int", "bytes", "no name at all"])
def test_a_name_that_is_no_text_is_a_type_error(spine: Spine, name: Any) -> None:
    """Also where the decorator was written without its name, so that the handler takes its place."""
    with pytest.raises(TypeError, match=r"domain\.action"):
        spine.operation(name)(nothing)
    assert spine.operation_count == 0


@pytest.mark.parametrize("name", ["shop.buy", "shop.v2.buy-now", "Shop_1.buy", "shop.1"])
def test_names_of_two_or_more_parts_are_taken(spine: Spine, name: str) -> None:
    """A domain may have sub-domains."""
    spine.operation(name)(nothing)
    assert spine.operations == (name,)


@pytest.mark.parametrize("handler", [None, 5, "nothing", {}, object()])
def test_a_handler_that_is_not_callable_is_a_type_error(spine: Spine, handler: Any) -> None:
    """TypeError names the operation."""
    with pytest.raises(TypeError, match=r"shop\.buy"):
        spine.operation("shop.buy")(handler)


def test_a_second_handler_for_a_name_is_a_runtime_error(spine: Spine) -> None:
    """Each operation has one handler, the same function included; the first one stays."""
    spine.operation("shop.buy")(nothing)
    for handler in (nothing, lambda ctx: {}):
        with pytest.raises(RuntimeError, match=r"shop\.buy"):
            spine.operation("shop.buy")(handler)
    assert spine.operation_count == 1


@pytest.mark.parametrize(
    ("declaration", "error", "named"),
    [
        ({"timeout_s": 0}, ConfigurationError, "timeout_s"),
        ({"timeout_s": -1}, ConfigurationError, "timeout_s"),
        ({"timeout_s": float("nan")}, ConfigurationError, "timeout_s"),
        ({"timeout_s": float("inf")}, ConfigurationError, "timeout_s"),
        ({"timeout_s": True}, ConfigurationError, "timeout_s"),
        ({"timeout_s": "5"}, ConfigurationError, "timeout_s"),
        ({"timeout_s": None}, ConfigurationError, "timeout_s"),
        ({"concurrency": 0}, ConfigurationError, "concurrency"),
        ({"concurrency": 1.5}, ConfigurationError, "concurrency"),
        ({"concurrency": True}, ConfigurationError, "concurrency"),
        ({"durability": "maybe"}, ConfigurationError, "durability"),
        ({"audit_fields": "cents"}, ConfigurationError, "audit_fields"),
        ({"params": dict}, TypeError, "params"),
        ({"params": Amount(cents=1)}, TypeError, "params"),
        ({"params": {"cents": int}}, TypeError, "params"),
    ],
)
def test_a_wrong_declaration_names_operation_and_field(
    spine: Spine, declaration: dict[str, Any], error: type[Exception], named: str
) -> None:
    """What cannot work is refused where it is declared, and leaves nothing registered."""
    with pytest.raises(error, match=rf"shop\.buy.*{named}"):
        spine.operation("shop.buy", **declaration)(nothing)
    assert spine.operations == ()


# -- what is told


def test_operations_are_told_before_the_start(spine: Spine) -> None:
    """Names sorted, count, has, and whether the registration is closed."""
    spine.operation("shop.sell")(nothing)
    spine.operation("bank.pay")(nothing)
    assert spine.operations == ("bank.pay", "shop.sell")
    assert spine.operation_count == 2
    assert spine.has_operation("bank.pay")
    assert not spine.has_operation("bank.rob")
    assert spine.frozen is False


@pytest.mark.anyio
async def test_registration_closes_with_the_start_and_stays_closed(spine: Spine) -> None:
    """After the start an operation is a RuntimeError that says so, while running and after the stop."""
    spine.operation("shop.buy")(nothing)
    async with running(spine):
        assert spine.frozen
        with pytest.raises(RuntimeError, match=r"shop\.late.*after the start"):
            spine.operation("shop.late")(nothing)
    with pytest.raises(RuntimeError, match="after the start"):
        spine.operation("shop.late")(nothing)
    assert spine.operations == ("shop.buy",)


@pytest.mark.anyio
async def test_status_tells_limits_and_what_runs_and_waits(spine: Spine) -> None:
    """``status()`` comes from the registry: each operation's declaration, and its calls at this moment."""
    entered, leave = anyio.Event(), anyio.Event()

    @spine.operation("shop.buy", concurrency=1, timeout_s=7, durability="buffered", idempotent=True)
    async def buy(ctx: OperationContext) -> dict[str, Any]:
        entered.set()
        await leave.wait()
        return {}

    async with running(spine), anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(functools.partial(spine.execute, "shop.buy", tenant_id="acme"))
        await entered.wait()
        status = await spine.status()
        assert status["operations"]["shop.buy"] == {
            "running": 1,
            "waiting": 2,
            "concurrency": 1,
            "timeout_s": 7,
            "durability": "buffered",
            "idempotent": True,
        }
        assert (status["count"], status["frozen"], status["governance"]) == (1, True, "active")
        leave.set()


# -- what kinds of handlers there are


class Counter:
    """Handlers may be methods and callable objects."""

    def __init__(self) -> None:
        self.calls = 0

    async def method(self, ctx: OperationContext) -> dict[str, Any]:
        self.calls += 1
        return {"calls": self.calls}

    async def __call__(self, ctx: OperationContext) -> dict[str, Any]:
        return await self.method(ctx)


class SyncCounter:
    def __call__(self, ctx: OperationContext) -> dict[str, Any]:
        return {"calls": 1}


async def with_argument(step: int, ctx: OperationContext) -> dict[str, Any]:
    return {"calls": step}


@pytest.mark.anyio
async def test_functions_methods_objects_and_partials_are_handlers(spine: Spine) -> None:
    """Whatever is called with the context and gives a result, synchronous or not."""
    handlers: list[Any] = [
        Counter().method,
        Counter(),
        SyncCounter(),
        functools.partial(with_argument, 1),
        lambda ctx: {"calls": 1},
        lambda ctx: OperationResult.ok({"calls": 1}),
    ]
    for number, handler in enumerate(handlers):
        spine.operation(f"count.h{number}")(handler)
    async with running(spine):
        for number in range(len(handlers)):
            result = await spine.execute(f"count.h{number}", tenant_id="acme")
            assert result.success, result.error
            assert result.data == {"calls": 1}
            assert result.operation == f"count.h{number}"
