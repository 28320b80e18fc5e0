"""The governance switch: the state every decision is made under, journaled before it acts, shared by all processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from actors.recorder import Recorder
from actors.records import governance_changed, text
from spine.governance.authority import (
    BYPASS_DEFAULT_S,
    BYPASS_MOST_S,
    GovernanceMode,
    GovernanceState,
)
from spine.governance.operations import SwitchGovernance
from spine.governance.params import id_problem
from spine.governance.units import Committed, GuardFailed, Record, StaleEpoch
from spine.kernel.clock import Clock
from spine.kernel.errors import ConfigurationError, JournalError, JournalUnavailable
from spine.kernel.messages import Envelope
from spine.kernel.tracing import Tracer

BILL_MOST = 100


class GovernanceRow(Protocol):
    """The state as the journal's projection holds it."""

    @property
    def state(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def actor(self) -> str | None: ...
    @property
    def since_at(self) -> int | None: ...
    @property
    def expires_at(self) -> int | None: ...


class GovernanceSource(Protocol):
    """Where the state is read."""

    async def governance(self) -> GovernanceRow:
        """The present state."""
        ...

    async def bypassed_denials(self, epoch: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """How many decisions of this epoch would have been denials, and the first ``limit`` of them."""
        ...


class Switch:
    """The last known state; outlives the registry's incarnations, so that an unreadable state is the last known one."""

    def __init__(self, source: GovernanceSource, clock: Clock, tracer: Tracer) -> None:
        self._source = source
        self._clock = clock
        self._tracer = tracer
        self.state = GovernanceState()

    async def refresh(self) -> GovernanceState:
        """Read the state again; where it cannot be read the last known one holds, and before any: governed."""
        try:
            row = await self._source.governance()
        except JournalError as error:
            self._tracer.fault("spine.governance.unreadable", exc=error, kept=self.state.mode.value)
            return self.state
        if row.epoch < self.state.epoch:
            # Read before a switch of this process committed.
            return self.state
        try:
            mode = GovernanceMode(row.state)
        except ValueError as error:
            self._tracer.fault("spine.governance.unreadable", exc=error, kept=self.state.mode.value)
            self.state = replace(self.state, epoch=row.epoch)
            return self.state
        self.state = GovernanceState(
            mode, row.epoch, row.reason or "", row.actor or "", row.since_at or 0, row.expires_at
        )
        return self.state

    async def follow(self, stale: StaleEpoch) -> None:
        """Read the state behind whose back a record was made; raises ``JournalUnavailable`` when it cannot be read."""
        await self.refresh()
        if self.state.epoch < stale.epoch:
            raise JournalUnavailable("the governance state cannot be read: nothing was recorded, ask again")

    async def restore_expired(self, recorder: Recorder) -> None:
        """End a bypass whose time is over, unless somebody has switched since: their word stands."""
        bypass, now = self.state, self._clock.time_us()
        if bypass.effective(now) is bypass:
            return
        after = GovernanceState(GovernanceMode.ACTIVE, bypass.epoch + 1, "the bypass expired", "spine", now)
        outcome = await recorder.commit([governance_changed(bypass, after, at=now)], epoch=bypass.epoch)
        if isinstance(outcome, Committed):
            self._changed(bypass, after)
            await self._bill(bypass, recorder)
        else:
            await self.refresh()

    def _changed(self, before: GovernanceState, after: GovernanceState, envelope: Envelope | None = None) -> None:
        self.state = after
        if self._tracer.decisions:
            self._tracer.decision(
                "spine.governance.changed",
                actor="registry",
                **({} if envelope is None else self._tracer.identity(envelope)),
                was=before.mode.value,
                now=after.mode.value,
                epoch=after.epoch,
                by=text(after.actor),
                reason=text(after.reason),
            )

    async def change(self, envelope: Envelope, request: SwitchGovernance, recorder: Recorder) -> GovernanceState:
        """Journal the new state, then let it act; raises ``ConfigurationError`` or ``JournalUnavailable``."""
        validate(request)
        while True:
            before, now = self.state, self._clock.time_us()
            expires = None if request.for_s is None else now + round(request.for_s * 1_000_000)
            after = GovernanceState(request.mode, before.epoch + 1, request.reason, request.actor, now, expires)
            rows = [governance_changed(before, after, at=now)]
            outcome = await recorder.commit(rows, epoch=before.epoch, parent=envelope)
            match outcome:
                case Committed():
                    break
                case StaleEpoch() | GuardFailed():
                    await self.refresh()
                    if self.state.epoch <= before.epoch:
                        raise JournalUnavailable("the governance state cannot be read: nothing was switched, ask again")
                case _:
                    acts = "look at the state before switching again" if outcome.unknown else "it does not act"
                    raise JournalUnavailable(f"{outcome.told(f'the switch to {request.mode.value!r}')}; {acts}")
        self._changed(before, after, envelope)
        if before.mode is not GovernanceMode.BYPASSED:
            return after
        # Decisions under the old epoch can no longer be committed: the bill of the bypass is final.
        return replace(after, would_have_denied=await self._bill(before, recorder))

    async def _bill(self, bypass: GovernanceState, recorder: Recorder) -> tuple[dict[str, Any], ...]:
        count, bodies = await self._source.bypassed_denials(bypass.epoch, BILL_MOST)
        denials = [
            {
                "decision_id": body["decision_id"],
                "operation": body["operation"],
                "run_id": body["run_id"],
                "code": body["would_have"]["code"],
                "reason": body["would_have"]["reason"],
            }
            for body in bodies
        ]
        await recorder.commit(
            [
                Record(
                    "governance.report",
                    self._clock.time_us(),
                    {"epoch": bypass.epoch, "denied": count, "would_have_denied": denials},
                )
            ]
        )
        return tuple(denials)


def validate(request: SwitchGovernance) -> None:
    """Raise ``ConfigurationError`` naming the field that is wrong."""
    for name, value in (("reason", request.reason), ("actor", request.actor)):
        if not isinstance(value, str) or not value.strip():
            raise ConfigurationError(f"{request.mode.value}: {name} {value!r} is empty: say why and who")
        if name == "actor" and (problem := id_problem(name, value)):
            raise ConfigurationError(f"{request.mode.value}: {problem}")
        if text(value) != text(value.replace("\x00", "")):
            raise ConfigurationError(f"{request.mode.value}: {name} holds a NUL character")
    seconds = request.for_s
    if request.mode is GovernanceMode.BYPASSED and (
        not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= BYPASS_MOST_S
    ):
        raise ConfigurationError(
            f"bypass: for_s {seconds!r} must be more than 0 and at most {BYPASS_MOST_S} seconds "
            f"(the default is {BYPASS_DEFAULT_S})"
        )
