"""Authority: what a decision is, how rules are bound, and how one verdict comes of many rules."""

from __future__ import annotations

import functools
import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from pydantic import BaseModel

from spine import AuthorityDecision, OperationContext, OperationResult, Spine
from spine.kernel.errors import ConfigurationError
from tests.governed import authority_fields, journal, running

ALLOW = AuthorityDecision.allow()


class Shop:
    """A Spine with the operation ``shop.buy``; its handler keeps the contexts it is called with."""

    def __init__(self, url: str, **declaration: Any) -> None:
        self.url = url
        self.spine = Spine(url)
        self.handled: list[OperationContext] = []

        @self.spine.operation("shop.buy", **declaration)
        async def buy(ctx: OperationContext) -> dict[str, Any]:
            self.handled.append(ctx)
            return {}

    async def buy(self, **call: Any) -> OperationResult:
        async with running(self.spine):
            return await self.spine.execute("shop.buy", tenant_id="acme", **call)

    @property
    def recorded(self) -> dict[str, Any]:
        """The body of the one decision."""
        (decision,) = journal(self.url, "decision")
        return decision

    @property
    def rules(self) -> dict[str, dict[str, Any]]:
        return {rule["id"]: rule for rule in self.recorded["rules"]}


@pytest.fixture
def shop(sqlite_url: str) -> Shop:
    return Shop(sqlite_url)


# -- the decision


@pytest.mark.parametrize(
    ("decision", "allowed", "degraded", "code"),
    [
        (AuthorityDecision.allow("fine"), True, False, "ALLOWED"),
        (AuthorityDecision.deny("no"), False, False, "DENIED"),
        (AuthorityDecision.deny("no", code="MINE"), False, False, "MINE"),
        (AuthorityDecision.allow_with_degraded_flag("half", ["a"]), True, True, "DEGRADED"),
        (AuthorityDecision.error("oops"), True, True, "AUTHORITY_CHECK_ERROR"),
    ],
)
def test_each_constructor_gives_its_verdict(
    decision: AuthorityDecision, allowed: bool, degraded: bool, code: str
) -> None:
    """Allow, deny, degraded and error set allowed, degraded and code."""
    assert (decision.allowed, decision.degraded, decision.code) == (allowed, degraded, code)
    assert json.loads(json.dumps(decision.to_dict())) == {
        "allowed": allowed,
        "degraded": degraded,
        "reason": decision.reason,
        "code": code,
        "conditions": list(decision.conditions),
    }


def test_a_decision_cannot_be_changed_and_a_condition_makes_a_new_one() -> None:
    """Decisions are frozen; ``with_condition`` leaves the original as it was and adds nothing twice."""
    with pytest.raises(FrozenInstanceError):
        ALLOW.allowed = False  # type: ignore[misc]
    marked = ALLOW.with_condition("reviewed").with_condition("reviewed")
    assert marked.conditions == ("reviewed",)
    assert ALLOW.conditions == ()


# -- binding rules


async def asynchronous(ctx: OperationContext) -> AuthorityDecision:
    return ALLOW


class AsynchronousCallable:
    async def __call__(self, ctx: OperationContext) -> AuthorityDecision:
        return ALLOW


@pytest.mark.parametrize(
    "function", [asynchronous, functools.partial(asynchronous), AsynchronousCallable(), 5, None, "shop"]
)
def test_a_rule_that_is_async_or_not_callable_is_refused(shop: Shop, function: Any) -> None:
    """Rules are synchronous callables: anything else is a TypeError when it is bound, not a surprise at a decision."""
    with pytest.raises(TypeError):
        shop.spine.rule("shop.*")(function)


@pytest.mark.parametrize(
    ("pattern", "options", "named"),
    [
        ("", {}, "pattern"),
        (5, {}, "pattern"),
        ("*", {"mode": "deny"}, "mode"),
        ("*", {"on_error": "ignore"}, "on_error"),
        ("*", {"id": "\ud800"}, "id"),
        ("*", {"id": 5}, "id"),
        ("*", {"version": 2}, "version"),
    ],
)
def test_a_wrong_declaration_of_a_rule_names_what_is_wrong(
    shop: Shop, pattern: Any, options: dict[str, Any], named: str
) -> None:
    """What could not be matched or recorded later is refused now."""
    with pytest.raises((ConfigurationError, TypeError), match=named):
        shop.spine.rule(pattern, **options)(lambda ctx: ALLOW)


def test_the_same_id_twice_on_a_pattern_is_refused(shop: Shop) -> None:
    """A duplicate rule is a RuntimeError; the same function may stand on two patterns."""
    shop.spine.rule("shop.*", id="limit")(lambda ctx: ALLOW)
    with pytest.raises(RuntimeError, match="limit"):
        shop.spine.rule("shop.*", id="limit")(lambda ctx: ALLOW)
    shop.spine.rule("other.*", id="limit")(lambda ctx: ALLOW)


@pytest.mark.anyio
async def test_a_rule_after_the_start_is_refused(shop: Shop) -> None:
    """Rules are frozen with the start."""
    async with running(shop.spine):
        with pytest.raises(RuntimeError, match="after the start"):
            shop.spine.rule("shop.*")(lambda ctx: ALLOW)


def test_binding_gives_the_function_back(shop: Shop) -> None:
    """The decorator does not change what it decorates."""

    def mine(ctx: OperationContext) -> AuthorityDecision:
        return ALLOW

    assert shop.spine.rule("shop.*")(mine) is mine


# -- modes


@pytest.mark.anyio
async def test_an_enforced_deny_keeps_the_handler_from_running(shop: Shop) -> None:
    """Mode enforce, the default: the caller gets the rule's own code and reason, the record names the rule."""

    @shop.spine.rule("shop.*", version="7")
    def too_much(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("too much", code="LIMIT")

    result = await shop.buy()
    assert (result.success, result.error_code, result.error) == (False, "LIMIT", "too much")
    assert result.decision is not None
    assert not result.decision.allowed
    assert shop.handled == []
    assert shop.recorded["final"]
    assert shop.recorded["code"] == shop.recorded["authority_code"] == "LIMIT"
    assert shop.rules["too_much"] == {
        "id": "too_much",
        "version": "7",
        "mode": "enforce",
        "outcome": "deny",
        "determined": True,
        "reason": "too much",
        "code": "LIMIT",
    }
    assert journal(shop.url, "outcome") == []


@pytest.mark.anyio
async def test_a_warning_deny_lets_it_run_degraded(shop: Shop) -> None:
    """Mode warn: a deny becomes a degraded allowance that carries the rule's code as a condition."""
    shop.spine.rule("shop.*", id="soft", mode="warn")(lambda ctx: AuthorityDecision.deny("too much", code="LIMIT"))
    result = await shop.buy()
    assert result.success
    assert result.decision is not None
    assert (result.decision.degraded, result.decision.code) == (True, "DEGRADED")
    assert result.decision.conditions == ("LIMIT",)
    assert result.metadata["authority_degraded"] is True
    assert len(shop.handled) == 1
    assert shop.rules["soft"]["outcome"] == "deny"
    assert shop.rules["soft"]["determined"]


@pytest.mark.anyio
async def test_a_shadow_deny_is_recorded_and_changes_nothing(shop: Shop) -> None:
    """Mode shadow: what it would have said is in the record as would_have, the decision is as without it."""
    shop.spine.rule("shop.*", id="next", mode="shadow")(lambda ctx: AuthorityDecision.deny("too much", code="LIMIT"))
    result = await shop.buy()
    assert result.success
    assert result.decision == ALLOW
    assert shop.recorded["would_have"] == {"code": "LIMIT", "reason": "too much"}
    assert shop.recorded["effect"] == "enforced"
    assert shop.rules["next"]["outcome"] == "deny"
    assert not shop.rules["next"]["determined"]


@pytest.mark.anyio
async def test_a_degraded_word_of_a_rule_flags_everything_it_leaves(shop: Shop) -> None:
    """Degraded beats allow: result, decision and outcome all carry the flag and its conditions."""
    shop.spine.rule("*", id="a")(lambda ctx: ALLOW)
    shop.spine.rule("*", id="b")(lambda ctx: AuthorityDecision.allow_with_degraded_flag("late data", ["stale"]))
    result = await shop.buy()
    assert result.success
    assert result.metadata["authority_degraded"] is True
    assert result.metadata["authority_reason"] == "late data"
    assert shop.recorded["conditions"] == ["stale"]
    (outcome,) = journal(shop.url, "outcome")
    assert outcome["authority_degraded"] is True
    assert [rule["determined"] for rule in shop.recorded["rules"]] == [False, True]


# -- several rules


@pytest.mark.anyio
async def test_all_matching_rules_are_asked_and_the_record_names_those_that_determined(shop: Shop) -> None:
    """A deny stops no other rule from being asked; each that said the most severe word determined the decision."""
    asked: list[str] = []

    def rule(pattern: str, name: str, said: AuthorityDecision) -> None:
        def function(ctx: OperationContext) -> AuthorityDecision:
            asked.append(name)
            return said

        shop.spine.rule(pattern, id=name)(function)

    rule("shop.*", "allows", ALLOW)
    rule("shop.buy", "denies first", AuthorityDecision.deny("one", code="ONE"))
    rule("*", "degrades", AuthorityDecision.allow_with_degraded_flag("half", ["c"]))
    rule("shop.b?y", "denies too", AuthorityDecision.deny("two", code="TWO"))
    rule("shop.sell", "of another operation", AuthorityDecision.deny("three", code="THREE"))
    rule("shop", "of a prefix alone", AuthorityDecision.deny("four", code="FOUR"))
    result = await shop.buy()
    assert asked == ["allows", "denies first", "degrades", "denies too"]
    assert result.error_code == "ONE"
    assert result.decision is not None
    assert result.decision.conditions == ("c",)
    assert {name: rule["determined"] for name, rule in shop.rules.items()} == {
        "allows": False,
        "denies first": True,
        "degrades": False,
        "denies too": True,
    }


@pytest.mark.anyio
async def test_an_allowing_rule_does_not_determine_what_the_governance_state_degraded(shop: Shop) -> None:
    """The degraded governance state, not the rule that had nothing against it, determined the decision."""
    shop.spine.rule("*", id="fine")(lambda ctx: ALLOW)
    async with running(shop.spine):
        await shop.spine.degrade(reason="maintenance", actor="ops")
        result = await shop.spine.execute("shop.buy", tenant_id="acme")
    assert result.metadata["authority_degraded"] is True
    assert shop.rules["fine"]["outcome"] == "allow"
    assert not shop.rules["fine"]["determined"]


@pytest.mark.anyio
async def test_without_rules_an_active_governance_allows(shop: Shop) -> None:
    """Nothing against it: allowed, with all four authority fields in result and records."""
    result = await shop.buy()
    assert result.success
    assert result.decision == ALLOW
    assert authority_fields(result.metadata) == []
    assert result.metadata["governance_active"] is True
    for body in journal(shop.url, "decision", "outcome"):
        assert authority_fields(body) == []


# -- rules that fail


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text either")


@pytest.mark.anyio
@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RecursionError("deep"), Unprintable()], ids=repr)
async def test_a_rule_that_raises_denies(shop: Shop, error: Exception) -> None:
    """Fail closed: RULE_ERROR, whatever was raised and whether or not it can be printed; nothing runs."""

    @shop.spine.rule("*", id="broken")
    def broken(ctx: OperationContext) -> AuthorityDecision:
        raise error

    async with running(shop.spine):
        result = await shop.spine.execute("shop.buy", tenant_id="acme")
        assert shop.spine.health().decisions["rule_errors"] == 1
    assert result.error_code == "RULE_ERROR"
    assert "'broken'" in str(result.error)
    assert type(error).__name__ in str(result.error)
    assert shop.handled == []
    assert shop.rules["broken"]["outcome"] == "error"
    assert shop.rules["broken"]["determined"]


@pytest.mark.anyio
async def test_a_rule_bound_to_allow_on_error_fails_open_and_says_so(shop: Shop) -> None:
    """``on_error="allow"``: allowed degraded, effect failed_open, counted."""

    @shop.spine.rule("*", id="broken", on_error="allow")
    def broken(ctx: OperationContext) -> AuthorityDecision:
        raise KeyError("absent")

    async with running(shop.spine):
        result = await shop.spine.execute("shop.buy", tenant_id="acme")
        counted = shop.spine.health().decisions
    assert result.success
    assert result.metadata["authority_degraded"] is True
    assert shop.recorded["effect"] == "failed_open"
    assert (counted["failed_open"], counted["rule_errors"]) == (1, 1)


@pytest.mark.anyio
async def test_a_failing_rule_of_one_mind_does_not_undo_anothers_deny(shop: Shop) -> None:
    """Failing open is no allowance: a deny of another rule still denies."""

    def broken(ctx: OperationContext) -> AuthorityDecision:
        raise KeyError("absent")

    shop.spine.rule("*", id="broken", on_error="allow")(broken)
    shop.spine.rule("*", id="firm")(lambda ctx: AuthorityDecision.deny("no", code="FIRM"))
    assert (await shop.buy()).error_code == "FIRM"
    assert shop.recorded["effect"] == "enforced"


@pytest.mark.anyio
@pytest.mark.parametrize("on_error", ["deny", "allow"])
async def test_a_shadow_rule_that_raises_changes_nothing(shop: Shop, on_error: Any) -> None:
    """A rule on trial neither denies nor makes the decision count as failed open."""

    def broken(ctx: OperationContext) -> AuthorityDecision:
        raise KeyError("absent")

    shop.spine.rule("*", id="trial", mode="shadow", on_error=on_error)(broken)
    result = await shop.buy()
    assert result.success
    assert result.decision == ALLOW
    assert shop.recorded["effect"] == "enforced"
    assert shop.rules["trial"]["outcome"] == "error"


@pytest.mark.anyio
async def test_a_warning_rule_that_raises_lets_it_run_degraded(shop: Shop) -> None:
    """Mode warn softens a failure of the rule as it softens its deny."""

    def broken(ctx: OperationContext) -> AuthorityDecision:
        raise KeyError("absent")

    shop.spine.rule("*", id="soft", mode="warn")(broken)
    result = await shop.buy()
    assert result.success
    assert result.metadata["authority_degraded"] is True


def coroutine_of(ctx: OperationContext) -> Any:
    return asynchronous(ctx)


def forged(decision: AuthorityDecision, **fields: Any) -> AuthorityDecision:
    """A decision with fields that its constructor would not take."""
    for name, value in fields.items():
        object.__setattr__(decision, name, value)
    return decision


@pytest.mark.anyio
@pytest.mark.parametrize(
    "function",
    [
        lambda ctx: None,
        lambda ctx: True,
        lambda ctx: "allow",
        lambda ctx: {"allowed": True},
        lambda ctx: OperationResult.ok(),
        lambda ctx: AuthorityDecision,
        lambda ctx: AuthorityDecision.deny(ValueError("not a text")),  # type: ignore[arg-type]
        lambda ctx: AuthorityDecision.deny("no", code=5),  # type: ignore[arg-type]
        lambda ctx: AuthorityDecision.allow(None),  # type: ignore[arg-type]
        lambda ctx: AuthorityDecision.allow_with_degraded_flag("half", [5]),  # type: ignore[list-item]
        lambda ctx: AuthorityDecision(False, False, "no way", "NO", None),  # type: ignore[arg-type]
        lambda ctx: forged(AuthorityDecision.deny("no way"), conditions=None),
        lambda ctx: forged(AuthorityDecision.deny("no way"), allowed=None),
        lambda ctx: object.__new__(AuthorityDecision),
        coroutine_of,
    ],
    ids=[
        "None",
        "True",
        "text",
        "dict",
        "a result",
        "the class",
        "reason not text",
        "code not text",
        "reason None",
        "condition not text",
        "conditions None",
        "conditions None, set later",
        "allowed None",
        "nothing set",
        "coroutine",
    ],
)
async def test_a_rule_that_does_not_return_a_decision_denies(shop: Shop, function: Any) -> None:
    """Anything but an AuthorityDecision made of texts is a failure of the rule: RULE_ERROR, recorded."""
    shop.spine.rule("*", id="odd")(function)
    result = await shop.buy()
    assert result.error_code == "RULE_ERROR"
    assert "'odd'" in str(result.error)
    assert shop.handled == []
    assert shop.rules["odd"]["outcome"] == "error"


@pytest.mark.anyio
async def test_texts_of_a_rule_that_cannot_be_stored_are_stored_readably(shop: Shop) -> None:
    """NUL, lone surrogates and pages of text in a rule's words do not keep its denial from being recorded."""
    said = AuthorityDecision.deny("a\x00b\ud800" + "x" * 100_000, code="C\x00")
    shop.spine.rule("*", id="odd")(lambda ctx: said)
    result = await shop.buy()
    assert not result.success
    assert shop.handled == []
    assert shop.recorded["reason"].startswith("a\\x00b\\ud800x")
    assert len(shop.recorded["reason"]) < 10_000


@pytest.mark.anyio
async def test_a_failure_of_the_check_itself_allows_flagged_and_counted(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should deciding itself break, it is AuthorityDecision.error: the operation runs, degraded, counted, recorded."""

    def breaks(_: object) -> None:
        raise RuntimeError("the check is broken")

    monkeypatch.setattr("actors.registry.check", breaks)
    async with running(shop.spine):
        result = await shop.spine.execute("shop.buy", tenant_id="acme")
        assert shop.spine.health().decisions["check_errors"] == 1
    assert result.success
    assert result.decision is not None
    assert (result.decision.code, result.decision.degraded) == ("AUTHORITY_CHECK_ERROR", True)
    assert shop.recorded["code"] == "AUTHORITY_CHECK_ERROR"


# -- what a rule sees


@pytest.mark.anyio
async def test_a_rule_sees_the_call_and_absent_keys_it_reads_are_recorded(shop: Shop) -> None:
    """The context names operation, tenant, run and params; each absent key that was read is a missing input, once."""
    seen: list[OperationContext] = []

    @shop.spine.rule("*")
    def look(ctx: OperationContext) -> AuthorityDecision:
        seen.append(ctx)
        ctx.params.get("region")
        ctx.params.get("region", "eu")
        assert "limit" not in ctx.params
        assert ctx.params["amount"] == 5
        with pytest.raises(TypeError):
            ctx.params["amount"] = 6  # type: ignore[index]
        return ALLOW

    result = await shop.buy(params={"amount": 5}, run_id="run-1", idempotency_key="k")
    assert result.success
    (ctx,) = seen
    assert (ctx.operation, ctx.tenant_id, ctx.run_id, ctx.idempotency_key) == ("shop.buy", "acme", "run-1", "k")
    assert shop.recorded["missing_inputs"] == ["region", "limit"]
    assert tuple(result.metadata["missing_inputs"]) == ("region", "limit")


@pytest.mark.anyio
async def test_a_rule_that_needs_an_absent_key_denies_and_the_key_is_named(shop: Shop) -> None:
    """A missing input is not an allowance: the KeyError is RULE_ERROR and the record says which key."""

    @shop.spine.rule("*", id="needs")
    def needs(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("too much") if ctx.params["amount"] > 5 else ALLOW

    result = await shop.buy()
    assert result.error_code == "RULE_ERROR"
    assert shop.recorded["missing_inputs"] == ["amount"]


class Order(BaseModel):
    amount: int
    lines: list[int] = []


@pytest.mark.anyio
async def test_what_a_rule_changes_reaches_neither_the_next_rule_nor_the_handler(sqlite_url: str) -> None:
    """Rules decide over a frozen input: nested params, model and the context's own fields are the caller's for all."""
    shop = Shop(sqlite_url, params=Order)
    seen: list[tuple[Any, ...]] = []

    def look(ctx: OperationContext) -> tuple[Any, ...]:
        return (ctx.tenant_id, ctx.model.amount, list(ctx.model.lines), list(ctx.params["lines"]))

    @shop.spine.rule("*", id="meddles")
    def meddles(ctx: OperationContext) -> AuthorityDecision:
        for meddle in (
            lambda: setattr(ctx, "tenant_id", "other"),
            lambda: setattr(ctx.model, "amount", 99),
            lambda: ctx.model.lines.append(99),
            lambda: ctx.params["lines"].append(99),
        ):
            try:
                meddle()
            except (AttributeError, TypeError, ValueError):
                continue
        return ALLOW

    @shop.spine.rule("*", id="next")
    def following(ctx: OperationContext) -> AuthorityDecision:
        seen.append(look(ctx))
        return ALLOW

    result = await shop.buy(params={"amount": 1, "lines": [1]})
    assert result.success
    seen.append(look(shop.handled[0]))
    assert seen == [("acme", 1, [1], [1])] * 2


@pytest.mark.anyio
async def test_a_rule_cannot_run_operations(shop: Shop) -> None:
    """Rules only decide: calling ``ctx.execute`` in one is an error of the rule and runs nothing."""

    @shop.spine.rule("*", id="acts")
    def acts(ctx: OperationContext) -> AuthorityDecision:
        started = ctx.execute("shop.buy")
        getattr(started, "close", lambda: None)()
        return ALLOW

    assert (await shop.buy()).error_code == "RULE_ERROR"
    assert shop.handled == []


@pytest.mark.anyio
async def test_the_secrets_of_a_call_do_not_leave_through_a_rules_words(sqlite_url: str) -> None:
    """A SecretStr in what a rule raises or gives as reason is masked in the record and in the caller's result."""
    from pydantic import SecretStr

    class Login(BaseModel):
        token: SecretStr

    shop = Shop(sqlite_url, params=Login)

    @shop.spine.rule("*", id="raises")
    def raises(ctx: OperationContext) -> AuthorityDecision:
        raise ValueError("bad token " + ctx.model.token.get_secret_value())

    @shop.spine.rule("*", id="denies")
    def denies(ctx: OperationContext) -> AuthorityDecision:
        return AuthorityDecision.deny("unknown token " + ctx.model.token.get_secret_value())

    result = await shop.buy(params={"token": "hunter2-hunter2"})
    assert "hunter2" not in json.dumps(journal(shop.url))
    assert "hunter2" not in str(result.error) + str(result.decision) + str(result.metadata)
    assert "bad token **********" in shop.rules["raises"]["reason"]
