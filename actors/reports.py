"""What is reported about a run beside its completion.

A worker's report that cannot be recorded never reaches the worker; a domain that acknowledges is told.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

import orjson

from actors.dependencies import Dependencies
from actors.judged import Overtaken
from actors.recorder import Recorder
from actors.records import ack, text
from actors.starts import implicit_start
from actors.verdicts import with_verdict
from spine.built_in import lesson_row, policy_evaluation_row
from spine.explain.contract import read_contract
from spine.governance.contract import FINALIZE, Acknowledge, AckStatus, ContractError, Key
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.params import PARAMS_MOST_BYTES, id_problem
from spine.governance.units import Committed, GuardFailed, Record, StaleEpoch
from spine.kernel.errors import DeadlineExceeded, JournalError, JournalUnavailable, SpineError
from spine.kernel.messages import Envelope
from spine.parts import Part


def _check(request: CreatePolicyEvaluation | EmitLesson, required: tuple[str, ...]) -> None:
    """Raise ValueError naming the field that cannot be recorded."""
    for name in required:
        if problem := id_problem(name, getattr(request, name)):
            raise ValueError(problem)
    if problem := id_problem("synthetic_scenario_id", request.synthetic_scenario_id, optional=True):
        raise ValueError(problem)


def _check_ack(request: Acknowledge, own: Collection[Key]) -> None:
    """Raise ContractError naming every field that is not taken; what is ``own`` the completion itself acknowledges."""
    problems = [
        id_problem(name, getattr(request, name), optional=name == "result_id")
        for name in ("run_id", "tenant_id", "domain", "action", "result_id")
    ]
    if not isinstance(request.status, str):
        problems.append(f"status must be text, not {type(request.status).__name__}")
    elif request.status not in tuple(AckStatus):
        problems.append(f"status {ascii(request.status)[:80]} is none of {', '.join(AckStatus)}")
    if request.error is not None and not isinstance(request.error, str):
        problems.append(f"error must be text, not {type(request.error).__name__}")
    found = [problem for problem in problems if problem]
    if not found and (request.domain, request.action) in own:
        found.append(f"{request.domain}/{request.action} is acknowledged by the completion itself: complete the run")
    if found:
        raise ContractError("INVALID_PARAMS", "; ".join(found))


def _what(request: Acknowledge) -> str:
    return f"what {request.domain!r} reports of {request.action!r} in run {request.run_id!r}"


class Reports:
    """Records evaluations, lessons and acknowledgements.

    For an evaluation or lesson it could not record it gives ``None``, and says so in journal and log.
    """

    def __init__(self, dependencies: Dependencies, recorder: Recorder, parts: Sequence[Part]) -> None:
        self._deps = dependencies
        self._exchange = dependencies.exchange
        self._runs = dependencies.runs
        self._recorder = recorder
        self._own = frozenset({FINALIZE, *((part.name, part.action) for part in parts)})

    async def evaluation(self, envelope: Envelope, request: CreatePolicyEvaluation) -> str | None:
        now, id_ = self._exchange.clock.time_us(), self._deps.ids.uuid()
        try:
            _check(request, ("run_id", "tenant_id", "run_status"))
            if not isinstance(request.policies_checked, int) or isinstance(request.policies_checked, bool):
                raise ValueError(  # noqa: TRY004  one kind of refusal for every field
                    f"policies_checked must be an integer, not {type(request.policies_checked).__name__}"
                )
            row = policy_evaluation_row(request, id=id_, at=now)
            record = Record(
                "policy.evaluation",
                now,
                {"run_id": request.run_id, "tenant_id": request.tenant_id, "row": row.to_dict()["row"]},
            )
            return id_ if await self._report(envelope, request.run_id, request.tenant_id, record) else None
        except Exception as error:  # noqa: BLE001  whatever is wrong with a report never reaches the worker
            await self._unreported(request.run_id, request.tenant_id, "policies", "create_policy_evaluation", error)
            return None

    async def lesson(self, envelope: Envelope, request: EmitLesson) -> UUID | None:
        now, id_ = self._exchange.clock.time_us(), self._deps.ids.uuid()
        try:
            _check(request, ("tenant_id", "source_event_id"))
            row = lesson_row(request, id=id_, at=now)
            record = Record("lesson", now, {"tenant_id": request.tenant_id, "row": row.to_dict()["row"]})
            return UUID(id_) if await self._report(envelope, None, request.tenant_id, record) else None
        except Exception as error:  # noqa: BLE001  whatever is wrong with a report never reaches the worker
            await self._unreported(None, request.tenant_id, "lessons", f"emit_{request.lesson}_lesson", error)
            return None

    async def acknowledge(self, envelope: Envelope, request: Acknowledge) -> None:
        """Record what a domain reports and the verdict that follows; raises ``ContractError`` or ``JournalError``."""
        _check_ack(request, self._own)
        run_id, tenant_id = request.run_id, request.tenant_id
        overtaken = Overtaken(run_id)
        while not envelope.done:
            rows = await self._deps.source.contract_rows(run_id)
            contract = read_contract(rows)
            if contract is None:
                raise ContractError(
                    "UNKNOWN_RUN", f"run {run_id!r} was never started: start it before its domains acknowledge"
                )
            if contract.tenant_id != tenant_id:
                raise ContractError("TENANT_MISMATCH", f"run {run_id!r} belongs to another tenant than {tenant_id!r}")
            now = self._exchange.clock.time_us()
            record = ack(
                run_id,
                tenant_id,
                request.domain,
                request.action,
                at=now,
                tx_id=None,
                result_id=request.result_id,
                status=str(request.status),
                error=request.error,
            )
            records = with_verdict([record], rows, at=now)
            outcome = await self._recorder.commit(records, run_id=run_id, parent=envelope)
            if isinstance(outcome, Committed):
                return
            if not isinstance(outcome, GuardFailed) or outcome.of_record:
                raise JournalUnavailable(f"{_what(request)} was not recorded: {outcome}; report it again")
            # Somebody judged the run, or reported of it, meanwhile: the verdict with this report may be another one.
            overtaken.by(rows)
        raise DeadlineExceeded(f"{_what(request)} was not recorded before its deadline: report again")

    async def _report(self, envelope: Envelope, run_id: str | None, tenant_id: str, record: Record) -> bool:
        """Record a report; raises ``SpineError`` or ``ValueError`` when that fails."""
        size = len(orjson.dumps(record.fields))
        if size > PARAMS_MOST_BYTES:
            raise ValueError(f"the report is {size} bytes as JSON, at most {PARAMS_MOST_BYTES} are taken")
        runs = self._runs
        while True:
            owner = None if run_id is None else runs.cached(run_id) or await runs.tenant(run_id)
            starts = run_id is not None and owner is None
            try:
                if owner is not None and owner != tenant_id:
                    raise SpineError(f"run {run_id!r} belongs to another tenant than {tenant_id!r}")
                rows, epoch = [record], None
                if starts and run_id is not None:
                    state = self._deps.switch.state.effective(record.at)
                    start = implicit_start(self._deps, run_id, tenant_id, None, state, record.at, accepted=True)
                    rows, epoch = [*start, record], state.epoch
                outcome = await self._recorder.commit(rows, epoch=epoch, run_id=run_id, parent=envelope)
                match outcome:
                    case Committed():
                        if starts and run_id is not None:
                            runs.started(run_id, tenant_id)
                        return True
                    case StaleEpoch():
                        await self._deps.switch.follow(outcome)
                    case GuardFailed() if starts:
                        continue
                    case _:
                        raise JournalError(f"the report was not recorded: {outcome}")
            finally:
                if starts and run_id is not None:
                    runs.abandoned(run_id)

    async def _unreported(self, run_id: Any, tenant_id: Any, domain: str, action: str, error: Exception) -> None:
        """The failure of a report, in log and journal; it never reaches the worker."""
        self._exchange.tracer.fault("spine.report.failed", exc=error, domain=domain, action=action, run_id=run_id)
        if id_problem("tenant_id", tenant_id):
            tenant_id = None
        own = run_id is not None and id_problem("run_id", run_id) is None and self._runs.cached(run_id) == tenant_id
        now = self._exchange.clock.time_us()
        fields = {
            "run_id": run_id if own else None,
            "tenant_id": tenant_id,
            "domain": domain,
            "action": action,
            "error": text(str(error)),
        }
        record = Record("report.failed", now, fields)
        await self._recorder.commit([record], run_id=run_id if own else None)
