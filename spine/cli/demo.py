"""A small varied day, so that a newcomer sees every kind of ending before writing a line."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from spine.cli.questions import list_runs
from spine.cli.reading import reading
from spine.cli.render import print_json, print_lines
from spine.cli.support import database_url, quiet_logs, shown_url
from spine.domains import Refused, RunFacts
from spine.explain import Explanation, explain
from spine.governance.authority import AuthorityDecision
from spine.governance.operations import OperationContext
from spine.governance.transactions import TransactionFailed
from spine.governance.units import Write
from spine.runtime import Spine

TENANT = "acme"
MOST_INTERESTING = "run-split-refund"


class Ledger:
    """A LOCAL domain of the user's own: it takes part in every completion and may refuse it."""

    name = "ledger"
    after: Sequence[str] = ("policies",)

    def plan(self, run: RunFacts) -> Sequence[Write]:
        """Refuse the one run whose bookings do not add up; nothing is written for the others."""
        if run.run_id == MOST_INTERESTING:
            raise Refused("REFUND_NOT_BOOKED", "the customer was promised 250.00 and 90.00 is booked")
        return ()


def shop(url: str) -> Spine:
    """A shop's Spine: one rule, three operations, one domain."""
    spine = Spine(url, domains=[Ledger()])

    @spine.rule("refunds.*", version="2")
    def small_refunds_only(ctx: OperationContext) -> AuthorityDecision:
        if ctx.params["amount_cents"] > 10_000:
            return AuthorityDecision.deny("refund over 100.00 needs a person", code="REFUND_LIMIT")
        return AuthorityDecision.allow()

    @spine.operation("orders.lookup")
    async def lookup(ctx: OperationContext) -> dict[str, Any]:
        await anyio.sleep(0.003)
        return {"order": ctx.params["order"], "total_cents": 25_000}

    @spine.operation("refunds.issue", audit_fields=["amount_cents"])
    async def issue(ctx: OperationContext) -> dict[str, Any]:
        await anyio.sleep(0.005)
        return {"refunded_cents": ctx.params["amount_cents"]}

    @spine.operation("mail.send")
    async def send(ctx: OperationContext) -> dict[str, Any]:
        raise ConnectionRefusedError(f"mail server refused {ctx.params['to']}")

    return spine


async def live_through(spine: Spine) -> None:
    """The day itself: a good run, a denial, a crash, a degraded hour, and a completion that is rolled back."""

    async def begin(run_id: str) -> None:
        await spine.start_run(run_id, tenant_id=TENANT, agent_id="a7")
        await act(run_id, "orders.lookup", order="A-17")

    async def act(run_id: str, operation: str, **params: Any) -> None:
        await spine.execute(operation, tenant_id=TENANT, run_id=run_id, params=params)

    async def end(run_id: str, status: str = "succeeded", **error: str) -> None:
        await spine.complete_run(run_id, tenant_id=TENANT, run_status=status, agent_id="a7", **error)

    await begin("run-small-refund")
    await act("run-small-refund", "refunds.issue", amount_cents=4_200)
    await end("run-small-refund")

    await begin("run-large-refund")
    await act("run-large-refund", "refunds.issue", amount_cents=25_000)
    await end("run-large-refund", "failed", error_code="REFUND_LIMIT", error_message="the refund was not issued")

    await begin("run-mail-down")
    await act("run-mail-down", "mail.send", to="ann@example.com")
    await end("run-mail-down", "failed")

    await begin("run-through-the-incident")
    await spine.degrade(reason="payment provider unstable", actor="ops@acme")
    await spine.start_run("run-too-late", tenant_id=TENANT, agent_id="a7")
    await end("run-through-the-incident")
    await spine.restore(reason="payment provider stable again", actor="ops@acme")

    await begin(MOST_INTERESTING)
    await act(MOST_INTERESTING, "refunds.issue", amount_cents=25_000)
    await act(MOST_INTERESTING, "refunds.issue", amount_cents=9_000)
    try:
        await end(MOST_INTERESTING)
    except TransactionFailed:
        # The day goes on: the journal holds what happened, and why tells it.
        return


def run_demo(db: str | None, *, as_json: bool) -> int:
    """Live through the day, then list its runs and ask why the most interesting one ended as it did."""
    url = database_url(db) if db else f"sqlite+aiosqlite:///{Path(tempfile.mkdtemp(prefix='spine-demo-')) / 'spine.db'}"
    quiet_logs(level="critical")
    answer = anyio.run(partial(_day, url))
    if as_json:
        print_json({"database": shown_url(url), "why": answer.to_dict()})
        return 0
    print_lines([("dim", f"one day of {TENANT}, recorded in {shown_url(url)}"), ("", ""), ("head", "$ spine runs")])
    anyio.run(partial(list_runs, url))
    print_lines([("", ""), ("head", f"$ spine why {MOST_INTERESTING}"), *answer.lines(), ("", ""), ("head", "try")])
    database = shown_url(url).removeprefix("sqlite+aiosqlite:///")
    for command in ("why run-large-refund", "why run-too-late", "ops", "verify"):
        print_lines([("", f"  spine {command} --db {database}")])
    return 0


async def _day(url: str) -> Explanation:
    async with shop(url) as spine:
        await live_through(spine)
    async with reading(url) as reader:
        rows = await reader.run_rows(MOST_INTERESTING)
        return explain(rows, now_us=time.time_ns() // 1_000, intact=await reader.run_evidence(MOST_INTERESTING, rows))
