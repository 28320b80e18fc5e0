"""Idempotency keys: the first call of a key runs, every repeat waits for its result or gets the stored one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Protocol

from actors.calls import Call
from spine.governance.authority import AuthorityDecision
from spine.governance.operations import OperationResult
from spine.kernel.clock import Clock

POLL_S = 0.05


class IdempotencyRow(Protocol):
    """What the journal tells of a key."""

    @property
    def digest(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def seq_decision(self) -> int: ...

    @property
    def seq_outcome(self) -> int | None: ...


class KeySource(Protocol):
    """Where keys are looked up."""

    async def idempotency(self, tenant_id: str, operation: str, key: str) -> IdempotencyRow | None:
        """The key's row, or ``None``."""
        ...

    async def body_at(self, seq: int) -> dict[str, Any]:
        """The body of a journal row."""
        ...


Key = tuple[str, str, str]


class Recall:
    """Answers repeats of a key; keys are per tenant and operation."""

    def __init__(self, source: KeySource, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self._open: dict[Key, tuple[Call, str, asyncio.Future[OperationResult | None]]] = {}

    async def recall(self, call: Call) -> OperationResult | AuthorityDecision | None:
        """The stored result, a refusal, or ``None``: then the call owns the key and must ``settle`` it."""
        assert call.key is not None and call.tenant_id is not None and call.accepted is not None
        key = (call.tenant_id, call.name, call.key)
        digest = call.accepted.digest
        while True:
            if (pending := self._open.get(key)) is not None:
                _, owner_digest, ended = pending
                if owner_digest != digest:
                    return _conflict(call)
                await asyncio.wait([ended], timeout=max(0.0, call.deadline - self._clock.monotonic()))
                if not ended.done():
                    return AuthorityDecision.deny(
                        f"the first call of key {call.key!r} did not end within this call's deadline: ask again",
                        "TIMEOUT",
                    )
                if (result := ended.result()) is not None:
                    return replace(result, metadata={**result.metadata, "repeated": True})
                continue
            mine: asyncio.Future[OperationResult | None] = asyncio.get_running_loop().create_future()
            self._open[key] = (call, digest, mine)
            try:
                stored = await self._stored(call, digest)
            except BaseException:
                self.settle(call, None)
                raise
            if stored is None:
                return None
            self.settle(call, stored if isinstance(stored, OperationResult) else None)
            return stored

    def settle(self, call: Call, result: OperationResult | None) -> None:
        """The owner's call ended; ``None`` when it left nothing that a repeat could be told."""
        key = (str(call.tenant_id), call.name, str(call.key))
        owned = self._open.get(key)
        if owned is not None and owned[0] is call:
            del self._open[key]
            owned[2].set_result(result)

    async def _stored(self, call: Call, digest: str) -> OperationResult | AuthorityDecision | None:
        assert call.key is not None and call.tenant_id is not None and call.operation is not None
        while (row := await self._source.idempotency(call.tenant_id, call.name, call.key)) is not None:
            if row.digest != digest:
                return _conflict(call)
            match row.state:
                case "done" if row.seq_outcome is not None:
                    return _repeat(
                        call, await self._source.body_at(row.seq_decision), await self._source.body_at(row.seq_outcome)
                    )
                case "denied":
                    return _repeat(call, await self._source.body_at(row.seq_decision), None)
                case "interrupted" if call.operation.idempotent:
                    call.attempt = int((await self._source.body_at(row.seq_decision))["attempt"]) + 1
                    return None
                case "interrupted":
                    return AuthorityDecision.deny(
                        f"the call with key {call.key!r} was interrupted and {call.name!r} is not idempotent: find "
                        " out what it did before using another key",
                        "IN_DOUBT",
                    )
                case _ if self._clock.monotonic() + POLL_S >= call.deadline:
                    return AuthorityDecision.deny(
                        f"another process still runs the call with key {call.key!r}: ask again", "IN_DOUBT"
                    )
                case _:
                    await self._clock.sleep_until(self._clock.monotonic() + POLL_S)
        return None


def _conflict(call: Call) -> AuthorityDecision:
    return AuthorityDecision.deny(
        f"key {call.key!r} was used for operation {call.name!r} with other params: use a new key for new params",
        "IDEMPOTENCY_CONFLICT",
    )


def _repeat(call: Call, decision: dict[str, Any], outcome: dict[str, Any] | None) -> OperationResult:
    """The result as the first caller got it, read from the record."""
    verdict = AuthorityDecision(
        decision["allowed"], decision["degraded"], decision["reason"], decision["code"], tuple(decision["conditions"])
    )
    flat = {
        name: decision[name]
        for name in ("governance_active", "authority_degraded", "authority_reason", "authority_code")
    }
    metadata = {**flat, "decision_id": decision["decision_id"], "repeated": True}
    if outcome is None:
        return OperationResult(
            False, None, verdict.reason, verdict.code, call.name, durable=True, decision=verdict, metadata=metadata
        )
    return OperationResult(
        outcome["success"],
        outcome.get("data"),
        outcome["error"],
        outcome["error_code"],
        call.name,
        duration_ms=(outcome["handle_us"] or 0) / 1000,
        durable=True,
        decision=verdict,
        metadata=metadata,
    )
