"""Parameters at the edge: what is taken, what is refused and how it is named, what is kept secret."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

import anyio
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretBytes, SecretStr, field_validator, model_serializer

from spine import OperationContext, OperationResult, Spine
from spine.governance.params import DEPTH_MOST, PARAMS_MOST_BYTES, InvalidParams, accept
from tests.governed import journal, path_of, running

# -- plain JSON is taken as it is

keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=6)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=10)
numbers = st.integers(min_value=-(2**53) + 1, max_value=2**53 - 1)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.floats(allow_nan=False, allow_infinity=False), texts)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
params = st.dictionaries(keys, values, max_size=5)
# What JSON cannot say, or says in a way that readers disagree about.
POISON: list[tuple[str, Any]] = [
    ("NaN", math.nan),
    ("infinity", math.inf),
    ("minus infinity", -math.inf),
    ("NUL", "a\x00b"),
    ("lone surrogate", "a\ud800b"),
    ("lone low surrogate", "\udfff"),
    ("2**53", 2**53),
    ("-2**53", -(2**53)),
    ("2**64", 2**64),
    ("10**400", 10**400),
    ("object", object()),
    ("set", {1}),
    ("bytes", b"a"),
    ("integer key", {1: "a"}),
    ("NUL in key", {"a\x00": 1}),
    ("surrogate in key", {"\ud800": 1}),
    ("None as key", {None: 1}),
    ("complex", 1j),
]


@given(params)
def test_plain_json_is_taken_and_given_back_unchanged(given_: dict[str, Any]) -> None:
    """The view of accepted params equals what was sent, and the digest does not depend on the order of keys."""
    accepted = accept(given_, None)
    assert dict(accepted.view([])) == given_
    assert accept(dict(reversed(given_.items())), None).digest == accepted.digest
    assert accepted.masked == ()


@given(params, params)
def test_the_digest_tells_different_params_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two params have one digest exactly when they are the same JSON."""

    def same(params: dict[str, Any]) -> str:
        return json.dumps(params, sort_keys=True)

    assert (accept(one, None).digest == accept(other, None).digest) == (same(one) == same(other))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (2**53 - 1, 2**53 - 1),
        (-(2**53) + 1, -(2**53) + 1),
        (-0.0, 0.0),
        (5e-324, 5e-324),
        ("é\U0001f600\u2028", "é\U0001f600\u2028"),
        (datetime(2024, 2, 29, tzinfo=UTC), "2024-02-29T00:00:00+00:00"),
        (UUID(int=5), str(UUID(int=5))),
        (Decimal("1.10"), "1.10"),
        ((1, 2), [1, 2]),
    ],
)
def test_the_edges_of_what_is_taken(value: Any, told: Any) -> None:
    """The largest exact integers, every text, and the few Python types that have one form in JSON."""
    accepted = accept({"v": value}, None)
    assert accepted.audited(("v",)) == {"v": told}


@pytest.mark.parametrize("given_", [None, {}])
def test_no_params_are_empty_params(given_: Any) -> None:
    """None and nothing are the same."""
    assert accept(given_, None).digest == accept({}, None).digest


# -- what cannot be recorded is refused, and named


@st.composite
def poisoned(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """Plain JSON with one poison in it, and the path to that."""
    value: Any = draw(st.sampled_from([poison for _, poison in POISON]))
    path = ""
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            key = draw(st.sampled_from(["a", "b", "c"]))
            value = {**draw(st.dictionaries(st.sampled_from(["x", "y"]), leaves, max_size=2)), key: value}
            path = f".{key}{path}"
        else:
            before = draw(st.lists(leaves, max_size=2))
            value = [*before, value] if draw(st.booleans()) else (*before, value)
            path = f"[{len(before)}]{path}"
    others = draw(st.dictionaries(st.sampled_from(["p", "q"]), values, max_size=2))
    return {**others, "field": value}, f"field{path}"


@given(poisoned())
def test_one_poison_anywhere_refuses_the_whole_and_its_path_is_named(case: tuple[dict[str, Any], str]) -> None:
    """NaN, NUL, lone surrogates, integers JSON rounds, foreign types and keys: refused wherever they hide."""
    given_, path = case
    with pytest.raises(InvalidParams) as refusal:
        accept(given_, None)
    assert f"{path}: " in refusal.value.told
    assert f"{path}: " in refusal.value.recorded
    for text in (refusal.value.told, refusal.value.recorded):
        text.encode()
        assert "\x00" not in text


@given(st.lists(st.sampled_from([poison for _, poison in POISON]), min_size=1, max_size=15))
def test_every_wrong_field_is_named(several: list[Any]) -> None:
    """Not only the first one, so that a caller corrects them in one go."""
    with pytest.raises(InvalidParams) as refusal:
        accept({f"f{number}": value for number, value in enumerate(several)}, None)
    for number in range(len(several)):
        assert f"f{number}: " in refusal.value.told


@given(st.text(min_size=8, max_size=30).filter(lambda text: text.isprintable() and text.isascii()))
def test_what_is_recorded_of_a_refusal_holds_no_value(secret: str) -> None:
    """The caller is shown what was wrong with its values; the journal is told only where and why."""
    assume(secret.strip() and secret not in "holds a NUL character")
    with pytest.raises(InvalidParams) as refusal:
        accept({"field": secret + "\x00", "amount": [math.nan]}, None)
    assert secret not in refusal.value.recorded
    assert "field: " in refusal.value.recorded
    assert "amount[0]: " in refusal.value.recorded


@pytest.mark.parametrize(
    "given_",
    [5, "text", [1], [("a", 1)], b"bytes", {1}, object()],
    ids=["int", "text", "list", "pairs", "bytes", "set", "object"],
)
def test_what_is_not_a_mapping_is_refused(given_: Any) -> None:
    """Params are a mapping."""
    with pytest.raises(InvalidParams, match="mapping"):
        accept(given_, None)


def nested(kind: str, depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else (value,) if kind == "tuple" else {"a": value}
    return value


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
@pytest.mark.parametrize("depth", [DEPTH_MOST + 1, 255, 1_000])
def test_depth_bombs_are_refused(kind: str, depth: int) -> None:
    """Nesting beyond the bound is refused however deep it goes on."""
    bomb = nested(kind, depth)
    try:
        with pytest.raises(InvalidParams, match="deep"):
            accept({"bomb": bomb}, None)
    finally:
        while isinstance(bomb, (list, tuple, dict)):
            bomb = bomb["a"] if isinstance(bomb, dict) else bomb[0]


@pytest.mark.parametrize("step", ["[value]", "(value,)", "{'a': value}"])
def test_the_deepest_bomb_does_not_kill_the_process(step: str) -> None:
    """A hundred thousand levels neither exhaust the stack nor corrupt the memory of the process that checks them."""
    program = f"""
import os
from spine.governance.params import InvalidParams, accept
value = 1
for _ in range(100_000):
    value = {step}
try:
    accept({{"bomb": value}}, None)
except InvalidParams:
    os.write(1, b"refused")
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"refused"), done.stderr


def test_nesting_up_to_the_bound_is_taken() -> None:
    """The bound itself is fine."""
    assert accept({"deep": nested("list", DEPTH_MOST - 1)}, None).digest


def test_a_structure_that_holds_itself_is_refused() -> None:
    """A circle is nesting without end."""
    circle: dict[str, Any] = {}
    circle["again"] = [circle]
    with pytest.raises(InvalidParams):
        accept(circle, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"blob": "x" * 10_000_000},
        lambda: {"blob": "é" * 5_000_000},
        lambda: {"list": list(range(1_500_000))},
        lambda: {"list": [math.nan] * 2_000_000},
        lambda: {"list": ["\ud800"] * 500_000},
        lambda: {f"k{number}": number for number in range(200_000)},
        lambda: {"x" * 10_000_000: 1},
        lambda: {"blob": "\x00" * 10_000_000},
    ],
    ids=["text", "wide text", "integers", "NaNs", "surrogates", "keys", "one key", "NULs"],
)
def test_ten_megabytes_are_refused_in_short_time_with_a_short_answer(make: Callable[[], dict[str, Any]]) -> None:
    """Too much is refused by size, and refusing it neither takes long nor repeats it back."""
    huge = make()
    began = time.perf_counter()
    with pytest.raises(InvalidParams) as refusal:
        accept(huge, None)
    assert time.perf_counter() - began < 2.0
    assert len(refusal.value.told) < 5_000


def test_a_megabyte_is_the_bound() -> None:
    """Just below is taken, one byte more is not."""
    room = PARAMS_MOST_BYTES - len('{"b":""}')
    assert accept({"b": "x" * room}, None).digest
    with pytest.raises(InvalidParams, match=str(PARAMS_MOST_BYTES)):
        accept({"b": "x" * (room + 1)}, None)


# -- models


class Line(BaseModel):
    sku: str
    count: int


class Order(BaseModel):
    amount: int
    currency: Literal["EUR", "USD"]
    lines: list[Line] = []
    note: str | None = None


def test_every_wrong_field_of_a_model_is_named() -> None:
    """Missing, of the wrong type, not among the choices, and nested ones."""
    with pytest.raises(InvalidParams) as refusal:
        accept({"amount": "much", "currency": "XXX", "lines": [{"sku": "a", "count": 1}, {"count": "no"}]}, Order)
    for path in ("amount: ", "currency: ", "lines.1.sku: ", "lines.1.count: "):
        assert path in refusal.value.told
        assert path in refusal.value.recorded
    assert "much" in refusal.value.told
    assert "much" not in refusal.value.recorded
    assert "XXX" not in refusal.value.recorded


def test_what_a_model_makes_of_the_input_is_checked_as_well() -> None:
    """A number text that becomes NaN or an inexact integer is refused like one sent as a number."""

    class Measured(BaseModel):
        value: float = 0.0
        count: int = 0

    for wrong in ({"value": "nan"}, {"value": "inf"}, {"count": str(2**53)}):
        with pytest.raises(InvalidParams):
            accept(wrong, Measured)
    assert accept({"value": "1.5", "count": "7"}, Measured).values == {"value": 1.5, "count": 7}


class Secretive(BaseModel):
    user: str
    token: SecretStr
    keys: list[SecretStr] = []
    nested: dict[str, SecretStr] = {}
    raw: SecretBytes = SecretBytes(b"")


SECRETS = {
    "user": "ann",
    "token": "s3cr3t-token",
    "keys": ["s3cr3t-key-0", "s3cr3t-key-1"],
    "nested": {"pin": "s3cr3t-pin"},
    "raw": b"s3cr3t-raw".decode(),
}


def test_secrets_are_masked_and_their_paths_listed() -> None:
    """What is recorded of a SecretStr is its place, in lists and mappings too."""
    accepted = accept(SECRETS, Secretive)
    assert accepted.masked == ("keys[0]", "keys[1]", "nested.pin", "raw", "token")
    audited = accepted.audited(tuple(SECRETS))
    assert "s3cr3t" not in json.dumps(audited)
    assert audited["user"] == "ann"
    assert audited["token"] == "**********"
    assert accepted.model is not None
    assert accepted.values["token"].get_secret_value() == "s3cr3t-token"


def test_secrets_are_scrubbed_from_any_text_plain_or_escaped() -> None:
    """An exception's text often holds the value it choked on, as it is or as its repr."""
    accepted = accept(SECRETS | {"token": "p\"a's\\s\nword"}, Secretive)
    text = f"bad key s3cr3t-key-1 for {SECRETS['raw']!r}: {KeyError(accepted.values['token'].get_secret_value())}"
    scrubbed = accepted.scrub(text)
    assert "s3cr3t" not in scrubbed
    assert "word" not in scrubbed
    assert scrubbed.startswith("bad key **********")


def test_a_wrong_secret_is_refused_without_being_shown_or_recorded() -> None:
    """The value of a secret field is in no refusal, not even where its own validator quotes it."""

    class Login(BaseModel):
        token: SecretStr

        @field_validator("token")
        @classmethod
        def long_enough(cls, token: SecretStr) -> SecretStr:
            raise ValueError(f"{token.get_secret_value()} is too short")

    with pytest.raises(InvalidParams) as refusal:
        accept({"token": "hunter2"}, Login)
    assert "token: " in refusal.value.recorded
    assert "hunter2" not in refusal.value.recorded

    with pytest.raises(InvalidParams) as refusal:
        accept({"user": "ann", "token": ["hunter2"]}, Secretive)
    assert "hunter2" not in refusal.value.recorded + refusal.value.told


# -- through a running Spine


class Desk:
    """A Spine with the operation ``desk.file`` whose handler keeps what it is given."""

    def __init__(self, url: str, **declaration: Any) -> None:
        self.spine = Spine(url)
        self.seen: list[OperationContext] = []

        @self.spine.operation("desk.file", **declaration)
        async def file(ctx: OperationContext) -> dict[str, Any]:
            self.seen.append(ctx)
            return {}

    async def file(self, params: Any) -> OperationResult:
        return await self.spine.execute("desk.file", tenant_id="acme", run_id="run-1", params=params)


@pytest.mark.anyio
@pytest.mark.parametrize("poison", [poison for _, poison in POISON], ids=[name for name, _ in POISON])
async def test_poison_is_a_recorded_result_and_the_handler_does_not_run(sqlite_url: str, poison: Any) -> None:
    """INVALID_PARAMS, never an exception; the denial is in the journal, the value is not, and the Spine goes on."""
    desk = Desk(sqlite_url)
    async with running(desk.spine):
        result = await desk.file({"good": "private matter", "bad": poison})
        assert result.error_code == "INVALID_PARAMS"
        assert "bad" in str(result.error)
        assert (await desk.file({"good": 1})).success
    assert len(desk.seen) == 1
    refused, _ = journal(sqlite_url, "decision")
    assert (refused["code"], refused["final"], refused["params"]) == ("INVALID_PARAMS", True, {})
    assert "private matter" not in json.dumps(refused)


class Explosive(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no keys")

    def __len__(self) -> int:
        return 1


class Buggy(BaseModel):
    amount: int

    @field_validator("amount")
    @classmethod
    def look_up(cls, amount: int) -> int:
        return {1: 1}[amount]


class Undumpable(BaseModel):
    amount: int = 1

    @model_serializer
    def dump(self) -> dict[str, Any]:
        raise RuntimeError("cannot be dumped")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("model", "given_"),
    [
        (None, Explosive()),
        (Buggy, {"amount": 2}),
        (Undumpable, {"amount": 1}),
        (None, {"m": Undumpable()}),
        (None, Undumpable()),
    ],
    ids=["mapping", "validator", "serializer", "nested serializer", "serializer of the params themselves"],
)
async def test_foreign_code_that_breaks_while_params_are_checked_breaks_nothing_else(
    sqlite_url: str, model: type[BaseModel] | None, given_: Any
) -> None:
    """A mapping, validator or serializer that raises is INVALID_PARAMS for its call; no actor crashes."""
    desk = Desk(sqlite_url, params=model)
    async with running(desk.spine):
        for _ in range(6):
            result = await desk.file(given_)
            assert result.error_code == "INVALID_PARAMS", result
        health = desk.spine.health()
        assert (health.restarts, health.crashes) == (0, ())
        assert health.ok
    assert desk.seen == []
    assert len(journal(sqlite_url, "decision")) == 6


@dataclass
class Box:
    value: int


class BoxModel(BaseModel):
    value: int


class Boxes(BaseModel):
    boxes: list[BoxModel] = []
    more: Any = None


def boxes() -> dict[str, Any]:
    return {
        "dict": {"value": 1},
        "list": [{"value": 1}],
        "ordered": OrderedDict(value=1),
        "tuple": ({"value": 1},),
        "dataclass": Box(1),
        "model": BoxModel(value=1),
    }


def change(given_: dict[str, Any]) -> None:
    given_["dict"]["value"] = 2
    given_["list"][0]["value"] = 2
    given_["ordered"]["value"] = 2
    given_["tuple"][0]["value"] = 2
    given_["dataclass"].value = 2
    given_["model"].value = 2
    given_["late"] = 2


@pytest.mark.anyio
async def test_what_the_caller_changes_later_does_not_reach_the_handler(sqlite_url: str) -> None:
    """Params are taken as they were at the call: nested containers and objects too, while it waits and runs."""
    spine = Spine(sqlite_url)
    entered, go_on = anyio.Event(), anyio.Event()
    seen: list[Any] = []

    @spine.operation("desk.file", audit_fields=["dict", "list", "ordered", "tuple", "dataclass", "model"])
    async def file(ctx: OperationContext) -> dict[str, Any]:
        entered.set()
        await go_on.wait()
        seen.append(ctx.params)
        return {}

    async def call() -> None:
        assert (await spine.execute("desk.file", tenant_id="acme", params=given_)).success

    given_ = boxes()
    async with running(spine), anyio.create_task_group() as group:
        group.start_soon(call)
        await entered.wait()
        change(given_)
        go_on.set()
    (params,) = seen
    assert params["dict"]["value"] == params["list"][0]["value"] == params["ordered"]["value"] == 1
    assert params["tuple"][0]["value"] == 1
    assert params["dataclass"]["value"] == params["model"]["value"] == 1
    assert "late" not in params


@pytest.mark.anyio
async def test_a_model_given_by_the_caller_is_taken_as_it_was(sqlite_url: str) -> None:
    """A pydantic instance as params, or nested in them, is not shared with the handler's model."""
    spine = Spine(sqlite_url)
    entered, go_on = anyio.Event(), anyio.Event()
    seen: list[int] = []

    @spine.operation("desk.file", params=Boxes)
    async def file(ctx: OperationContext) -> dict[str, Any]:
        entered.set()
        await go_on.wait()
        seen.extend([ctx.model.boxes[0].value, ctx.params["boxes"][0]["value"]])
        return {}

    box = BoxModel(value=1)

    async def call(params: Any) -> None:
        assert (await spine.execute("desk.file", tenant_id="acme", params=params)).success

    async with running(spine):
        for params in (Boxes(boxes=[box]), {"boxes": [box]}):
            box.value = 1
            async with anyio.create_task_group() as group:
                group.start_soon(call, params)
                await entered.wait()
                box.value = 2
                go_on.set()
            entered, go_on = anyio.Event(), anyio.Event()
    assert seen == [1, 1, 1, 1]


@pytest.mark.anyio
async def test_only_audit_fields_are_recorded_and_the_rest_by_digest(sqlite_url: str) -> None:
    """Without audit_fields nothing of the params enters the journal; with them only the named ones."""
    spine = Spine(sqlite_url)

    @spine.operation("desk.file", audit_fields=["amount", "absent"])
    @spine.operation("desk.hide")
    async def file(ctx: OperationContext) -> dict[str, Any]:
        return {}

    sent = {"amount": {"cents": [5]}, "name": "private matter"}
    async with running(spine):
        for operation in spine.operations:
            assert (await spine.execute(operation, tenant_id="acme", params=sent)).success
    filed, hidden = journal(sqlite_url, "decision")
    assert filed["params"] == {"amount": {"cents": [5]}}
    assert hidden["params"] == {}
    assert filed["params_digest"] == hidden["params_digest"]
    assert len(filed["params_digest"]) == 64
    assert "private" not in json.dumps(journal(sqlite_url))


@pytest.mark.anyio
async def test_no_secret_is_in_any_file_of_the_database(sqlite_url: str) -> None:
    """A secret in params enters the journal by no way: fields, errors, the handler's exception or its own failure."""
    spine = Spine(sqlite_url)

    @spine.operation("desk.file", params=Secretive, audit_fields=tuple(SECRETS))
    async def file(ctx: OperationContext) -> OperationResult:
        token = ctx.model.token.get_secret_value()
        if ctx.params["user"] == "raises":
            raise PermissionError(f"{token} and {ctx.model.raw.get_secret_value()!r} were refused")
        if ctx.params["user"] == "fails":
            return OperationResult.fail(f"{token} was refused", "REFUSED")
        return OperationResult.ok({"length": len(token)})

    async with running(spine):
        for user in ("ann", "raises", "fails"):
            sent = SECRETS | {"user": user}
            result = await spine.execute("desk.file", tenant_id="acme", params=sent, idempotency_key=user)
            assert "s3cr3t" not in str(result), user
        assert (await spine.execute("desk.file", tenant_id="acme", params=SECRETS | {"token": 5})).error_code
        path = path_of(sqlite_url)
        for file_ in path.parent.glob(path.name + "*"):
            assert b"s3cr3t" not in file_.read_bytes(), file_
    assert b"s3cr3t" not in path.read_bytes()
    first = journal(sqlite_url, "decision")[0]
    assert first["masked"] == ["keys[0]", "keys[1]", "nested.pin", "raw", "token"]
    assert first["params"]["user"] == "ann"


def test_a_value_that_holds_itself_twice_level_by_level_is_refused_soon() -> None:
    """Forty such levels are a trillion values as JSON: they are refused by count, not walked."""
    value: list[Any] = []
    for _ in range(40):
        value = [value, value]
    with pytest.raises(InvalidParams, match="more than 100000 values"):
        accept({"value": value}, None)
