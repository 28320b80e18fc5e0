"""A completion as data: the run's request, one step for each domain, and how far each has come; nothing waits here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.records import text
from actors.verdicts import lacking
from spine.built_in import BuiltIn, Row
from spine.domains import Local, Refused, RunFacts, said_by
from spine.effects import ATTEMPTS, TIMEOUT_S
from spine.explain.story import JournalRow
from spine.governance.contract import FINALIZE, AckStatus
from spine.governance.params import id_problem
from spine.governance.recordable import copied, recorded
from spine.governance.transactions import (
    INTERRUPTED,
    STALLED,
    CompleteRun,
    DomainClass,
    StepState,
    TxState,
    move_step,
)
from spine.governance.units import WRITE_GUARD, Record, Write
from spine.kernel.errors import ConfigurationError, SpineError, describe
from spine.kernel.ids import named
from spine.parts import Part, Participant


@dataclass(slots=True)
class Step:
    """One part of the transaction; ``domain`` is ``None`` when this process does not know it.

    ``code`` and ``error`` tell why it failed or is parked, ``hiccup`` why a rollback failed that was tried again.
    """

    n: int
    name: str
    cls: DomainClass
    action: str
    after: tuple[str, ...]
    effect_id: str
    domain: Participant | None
    timeout_s: float = TIMEOUT_S
    attempts: int = ATTEMPTS
    state: StepState = StepState.PLANNED
    rows: tuple[Row, ...] = ()
    writes: tuple[Write, ...] = ()
    descriptor: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    code: str | None = None
    error: str | None = None
    hiccup: str | None = None

    @property
    def external(self) -> bool:
        """Whether it acts outside the journal's database before the commit."""
        return self.cls is DomainClass.EXTERNAL

    @property
    def result_id(self) -> str | None:
        """The id of what the domain wrote or did: what it returned as ``id``, else the effect's own."""
        if self.result is not None:
            given = self.result.get("id")
            return self.effect_id if id_problem("id", given) else str(given)
        return self.effect_id if self.state is StepState.DONE else None


@dataclass(slots=True)
class Plan:
    """A transaction as its driver knows it; ``failed`` is the step that refused or failed, ``code`` and ``error`` how.

    ``interrupted`` tells that no domain ended it, whatever its code: the process ended, or stopped, before the answer.
    ``flags`` are the four authority fields it was accepted under, ``epoch`` the fencing token it is driven with,
    ``rows`` what the journal held of the run's contract when it was planned. ``rollback_audit`` tells, for as long as
    the transaction lasts, whether what is undone is acknowledged. ``stalled`` counts the drivers that have ended in a
    row without bringing it any further.
    """

    request: CompleteRun
    tx_id: str
    attempt: int
    previous: str | None
    digest: str
    flags: Mapping[str, Any]
    governance_epoch: int
    at: int
    instance: str
    steps: list[Step]
    epoch: int = 1
    state: TxState = TxState.EXECUTING
    counts: tuple[int, int, int] = (0, 0, 0)
    failed: Step | None = None
    code: str | None = None
    error: str | None = None
    cause: BaseException | None = None
    interrupted: bool = False
    duration_ms: int = 0
    start: list[Record] = field(default_factory=list)
    rows: Sequence[JournalRow] = ()
    rollback_audit: bool = True
    stalled: int = 0

    @property
    def writes(self) -> list[Write]:
        """Every statement of the users' domains, in order."""
        return [write for step in self.steps for write in step.writes]

    @property
    def external(self) -> bool:
        """Whether a domain takes part that must be undone if the completion does not commit."""
        return any(step.external for step in self.steps)

    def before_commit(self) -> list[Step]:
        """The steps that the commit waits for."""
        return [step for step in self.steps if step.cls is not DomainClass.POST]

    def facts(self, step: Step) -> RunFacts:
        """What the step's domain may know."""
        request = self.request
        return RunFacts(
            run_id=request.run_id,
            tenant_id=request.tenant_id,
            run_status=request.run_status,
            tx_id=self.tx_id,
            completed_at=self.at,
            effect_id=step.effect_id,
            agent_id=request.agent_id,
            error_code=request.error_code,
            error_message=request.error_message,
            trace_id=request.trace_id,
            is_synthetic=request.is_synthetic,
            synthetic_scenario_id=request.synthetic_scenario_id,
            completion_key=request.completion_key,
            operations=self.counts[0],
            operations_denied=self.counts[1],
            operations_failed=self.counts[2],
            # Its own: what it changes in them must not reach the record.
            results={
                other.name: copied(dict(other.result)) for other in self.steps[: step.n] if other.result is not None
            },
        )


def steps_of(parts: Sequence[Part], tx_id: str) -> list[Step]:
    """The steps of a new transaction."""
    return [
        Step(n, part.name, part.cls, part.action, part.after, effect, part.domain, part.timeout_s, part.attempts)
        for n, (part, effect) in enumerate(zip(parts, named(tx_id, [part.name for part in parts]), strict=True))
    ]


def finalised(rows: Iterable[JournalRow]) -> bool:
    """Whether a completion of the run was committed before, under whatever key."""
    return any(
        (body.get("domain"), body.get("action")) == FINALIZE and body.get("status") == AckStatus.SUCCESS
        for body in (row.body for row in rows)
    )


def contract_step(plan: Plan) -> Step:
    """What stands for the run's contract where a domain would be named."""
    return Step(len(plan.steps), "contract", DomainClass.LOCAL, "reconcile", (), plan.tx_id, None)


def check_contract(plan: Plan) -> None:
    """Refuse the commit of a run that is bound to its contract while something it promised is not delivered."""
    found = lacking(plan.rows, [(step.name, step.action) for step in plan.steps])
    if found:
        reason = "; ".join(map(str, found))
        fail(plan, contract_step(plan), StepState.REFUSED, "CONTRACT_UNMET", reason, None)


def carry_out(plan: Plan) -> None:
    """Ask every domain for its part in the commit, in order, until one refuses or raises."""
    for step in plan.steps:
        prepare(plan, step)
        if plan.failed is not None:
            return


def prepare(plan: Plan, step: Step) -> None:
    """Have a LOCAL step planned, or a POST step described; what it raises is the completion's failure."""
    if step.cls is DomainClass.LOCAL:
        step.state = move_step(step.state, StepState.INTENT, TxState.EXECUTING)
    try:
        if step.cls is DomainClass.LOCAL:
            _ask(step, plan.facts(step))
            step.state = move_step(step.state, StepState.DONE, TxState.EXECUTING)
        else:
            step.descriptor = described(plan, step)
    except BaseException as error:  # noqa: BLE001  a domain is foreign code: its failure rolls the completion back
        fail_with(plan, step, error)


def described(plan: Plan, step: Step) -> Mapping[str, Any]:
    """What the step's effect is described by, as plain JSON; raises what the domain raises, TypeError or ValueError."""
    facts = plan.facts(step)
    describe_it = getattr(step.domain, "describe", None)
    given = facts.descriptor() if describe_it is None else describe_it(facts)
    return as_json(given, f"domain {step.name!r} described its effect by {type(given).__name__}, which")


def as_json(given: object, what: str) -> Mapping[str, Any]:
    """A mapping as the journal will hold it; raises TypeError or ValueError that begin with ``what``."""
    try:
        return recorded(given)
    except TypeError as error:
        raise TypeError(f"{what} {error}") from error
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error


def fail_with(plan: Plan, step: Step, error: BaseException) -> None:
    """Mark the step whose domain raised: a business no, or a failure."""
    if isinstance(error, Refused):
        fail(plan, step, StepState.REFUSED, *said_by(error), error)
    else:
        fail(plan, step, StepState.UNKNOWN, type(error).__name__, describe(error), error)


def fail(plan: Plan, step: Step, state: StepState, code: str, error: str, cause: BaseException | None) -> None:
    """Mark the step that failed; what LOCAL domains planned was never written."""
    if step.state is StepState.INTENT:
        step.state = move_step(step.state, state, TxState.EXECUTING)
    step.code, step.error = plan.code, plan.error = text(code), text(error)
    plan.failed, plan.cause = step, cause
    # A domain that spells the same code has raised something.
    plan.interrupted = code == INTERRUPTED and cause is None


def give_up(plan: Plan, step: Step, error: str) -> None:
    """Mark the step at which one driver after the other ended: it is not tried once more."""
    if step.cls is DomainClass.LOCAL:
        step.state = move_step(step.state, StepState.INTENT, TxState.EXECUTING)
    fail(plan, step, StepState.UNKNOWN, STALLED, error, None)


def next_asked(plan: Plan) -> Step | None:
    """The first user's domain that has yet to do its part, or is asked again; those before a sent one had theirs."""
    sent = [n for n, step in enumerate(plan.steps) if step.external and step.state is not StepState.PLANNED]
    ahead = plan.steps[sent[-1] if sent else 0 :]
    return next((s for s in ahead if s.state is not StepState.DONE and not isinstance(s.domain, BuiltIn)), None)


def _ask(step: Step, facts: RunFacts) -> None:
    domain = step.domain
    if isinstance(domain, BuiltIn):
        step.rows = domain.rows(facts)
        return
    if not isinstance(domain, Local):
        raise ConfigurationError(f"domain {step.name!r} is not declared here: declare it, or complete the run again")
    planned: object = domain.plan(facts)
    if inspect.iscoroutine(planned):
        planned.close()
    if not isinstance(planned, Sequence):
        raise TypeError(f"domain {step.name!r} planned {type(planned).__name__}: plan(run) must return Write objects")
    writes = tuple(planned)
    for write in writes:
        if not isinstance(write, Write):
            raise TypeError(f"domain {step.name!r} planned {type(write).__name__}: plan(run) must return Write objects")
    step.writes = writes


def guard_failed(plan: Plan, guard: str, found: int | None, required: int) -> None:
    """A user's write failed, or did not change what it must: fail the domain it belongs to."""
    number = int(guard.removeprefix(WRITE_GUARD).partition(":")[0])
    for step in plan.steps:
        if number < len(step.writes):
            wrong = "failed" if found is None else f"changed {found} rows where {required} are required"
            step.state = StepState.INTENT
            fail(plan, step, StepState.REFUSED, "WRITE_GUARD", f"its write {wrong} ({guard})", None)
            return
        number -= len(step.writes)
    raise SpineError(f"transaction {plan.tx_id}: {guard} belongs to no domain")


def stood_on(steps: Sequence[Step], standing: Sequence[Step]) -> set[str]:
    """The names of the domains that those ``standing`` came after, directly or by way of others."""
    after = {step.name: step.after for step in steps}
    found: set[str] = set()
    waiting = [name for step in standing for name in step.after]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(after.get(name, ()))
    return found
