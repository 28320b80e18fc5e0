"""How a run starts: asked for by ``start_run``, or implied by its first operation or its completion."""

from __future__ import annotations

from actors import records
from actors.dependencies import Dependencies
from spine.governance.authority import AuthorityDecision, GovernanceMode, GovernanceState, check_start
from spine.governance.contract import EXPECTATIONS_MOST, Expectation
from spine.governance.operations import StartRun
from spine.governance.params import id_problem
from spine.governance.units import Committed, GuardFailed, Record, StaleEpoch, StorageFailed
from spine.kernel.errors import JournalError
from spine.kernel.messages import Envelope


def may_begin(state: GovernanceState) -> bool:
    """Whether a run may start under this state."""
    return state.mode in (GovernanceMode.ACTIVE, GovernanceMode.BYPASSED)


def implicit_start(
    dependencies: Dependencies,
    run_id: str,
    tenant_id: str,
    agent_id: str | None,
    state: GovernanceState,
    now: int,
    *,
    accepted: bool = False,
) -> list[Record]:
    """The records of a run that begins with its first message; ``accepted`` whatever the state, as completions are."""
    return records.run_started(
        run_id,
        tenant_id,
        agent_id,
        check_start(state, completion=accepted),
        state,
        at=now,
        instance=dependencies.instance,
        implicit=True,
        expectations=dependencies.promises(()),
    )


async def start_run(dependencies: Dependencies, envelope: Envelope, request: StartRun) -> AuthorityDecision:
    """Decide on a start and have it recorded; a run that exists already gives the decision it started with."""
    decision = await _decide(dependencies, envelope, request)
    tracer = envelope.exchange.tracer
    if tracer.decisions:
        state = dependencies.switch.state.effective(envelope.exchange.clock.time_us())
        tracer.decision(
            "spine.decision",
            actor="registry",
            **tracer.identity(envelope),
            tenant_id=None if id_problem("tenant_id", request.tenant_id) else request.tenant_id,
            operation="run.start",
            allowed=decision.allowed,
            code=decision.code,
            reason=decision.reason,
            **records.flat_text(decision, state),
        )
    return decision


async def _decide(dependencies: Dependencies, envelope: Envelope, request: StartRun) -> AuthorityDecision:
    problem = _problem(request)
    if problem is not None:
        return await _refuse(dependencies, envelope, request, AuthorityDecision.deny(problem, "INVALID_PARAMS"))
    run_id, runs = request.run_id, dependencies.runs
    clock = envelope.exchange.clock
    try:
        while (tenant := await runs.tenant(run_id)) is None:
            try:
                state = dependencies.switch.state.effective(clock.time_us())
                decision = check_start(state)
                if not decision.allowed:
                    denied = await _deny(dependencies, envelope, request, decision, state)
                    if denied is not None:
                        return denied
                    continue
                rows = records.run_started(
                    run_id,
                    request.tenant_id,
                    request.agent_id,
                    decision,
                    state,
                    at=clock.time_us(),
                    instance=dependencies.instance,
                    implicit=False,
                    expectations=dependencies.promises([Expectation(*e) for e in request.expectations]),
                    block_unmet=request.block_unmet,
                )
                outcome = await dependencies.recorder.commit(rows, epoch=state.epoch, run_id=run_id, parent=envelope)
                match outcome:
                    case Committed():
                        runs.started(run_id, request.tenant_id)
                        return decision
                    case StaleEpoch():
                        await dependencies.switch.follow(outcome)
                    case GuardFailed():
                        continue
                    case _:
                        return _unrecorded(run_id, outcome)
            finally:
                runs.abandoned(run_id)
        if tenant != request.tenant_id:
            reason = f"run {run_id!r} belongs to another tenant than {request.tenant_id!r}: use another run id"
            return await _refuse(dependencies, envelope, request, AuthorityDecision.deny(reason, "TENANT_MISMATCH"))
        return await _started_with(dependencies, run_id)
    except JournalError as error:
        return _unrecorded(run_id, StorageFailed(str(error)))


async def _started_with(dependencies: Dependencies, run_id: str) -> AuthorityDecision:
    row = await dependencies.source.run(run_id)
    assert row is not None
    told = (await dependencies.source.body_at(row.started_seq))["decision"]
    return AuthorityDecision(
        told["allowed"], told["degraded"], told["reason"], told["code"], tuple(told.get("conditions", ()))
    )


async def _refuse(
    dependencies: Dependencies, envelope: Envelope, request: StartRun, decision: AuthorityDecision
) -> AuthorityDecision:
    refused = await _deny(dependencies, envelope, request, decision, None)
    return refused or decision


async def _deny(
    dependencies: Dependencies,
    envelope: Envelope,
    request: StartRun,
    decision: AuthorityDecision,
    state: GovernanceState | None,
) -> AuthorityDecision | None:
    """Record a denial; one that a governance ``state`` gave is ``None`` when that state holds no more."""
    stored = {
        name: None if id_problem(name, value, optional=True) else value
        for name, value in (
            ("run_id", request.run_id),
            ("tenant_id", request.tenant_id),
            ("agent_id", request.agent_id),
        )
    }
    foreign = decision.code == "TENANT_MISMATCH" or stored["tenant_id"] is None
    record = records.run_denied(
        None if foreign else stored["run_id"],
        stored["tenant_id"],
        stored["agent_id"],
        dependencies.ids.uuid(),
        decision,
        state or dependencies.switch.state,
        at=envelope.exchange.clock.time_us(),
        instance=dependencies.instance,
        claimed_run_id=stored["run_id"] if foreign else None,
    )
    outcome = await dependencies.recorder.commit(
        [record], epoch=None if state is None else state.epoch, run_id=stored["run_id"], parent=envelope
    )
    if isinstance(outcome, StaleEpoch):
        await dependencies.switch.follow(outcome)
        return None
    dependencies.counts.denied += 1
    if isinstance(outcome, Committed):
        return decision
    failed = outcome if isinstance(outcome, StorageFailed) else StorageFailed(repr(outcome))
    return _unrecorded(str(stored["run_id"]), failed)


def _unrecorded(run_id: str, failed: StorageFailed) -> AuthorityDecision:
    told = failed.told(f"the start of run {run_id!r}")
    return AuthorityDecision.deny(f"{told}; free the journal's storage and ask again", "JOURNAL_UNAVAILABLE")


def _problem(request: StartRun) -> str | None:
    found = [
        id_problem("run_id", request.run_id),
        id_problem("tenant_id", request.tenant_id),
        id_problem("agent_id", request.agent_id, optional=True),
    ]
    if not isinstance(request.block_unmet, bool):
        found.append(f"block_unmet must be true or false, not {request.block_unmet!r}")
    given = request.expectations
    if len(given) > EXPECTATIONS_MOST:
        found.append(f"expectations: {len(given)} are too many, at most {EXPECTATIONS_MOST} are taken for one run")
    for entry in given[:EXPECTATIONS_MOST]:
        if not isinstance(entry, tuple) or len(entry) != 3:
            found.append(f"expectations: {entry!r} must be (domain, action, deadline in seconds)")
            continue
        domain, action, seconds = entry
        found += [id_problem("expectation domain", domain), id_problem("expectation action", action)]
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds < 1e9:
            found.append(f"expectations: deadline {seconds!r} of {domain!r} must be a positive number of seconds")
    problems = [problem for problem in found if problem]
    return "; ".join(problems) or None
