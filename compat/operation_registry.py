"""The operation registry for blocking code: the same authority, the same record, a result instead of an awaitable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from compat.bridge import BRIDGE
from spine.governance.operations import Execute, OperationResult

__all__ = ["OperationRegistry", "OperationResult", "get_operation_registry"]


class OperationRegistry:
    """Executes the operations that the target Spine has registered."""

    __slots__ = ()

    def execute(
        self,
        operation: str,
        *,
        tenant_id: str,
        run_id: str | None = None,
        params: Mapping[str, Any] | BaseModel | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = 30.0,
    ) -> OperationResult:
        """Run ``operation``, ``timeout_s`` seconds at most; every governed ending is a result."""
        sent = params.model_dump() if isinstance(params, BaseModel) else params
        return BRIDGE.ask(Execute(operation, tenant_id, run_id, sent, idempotency_key, timeout_s))


_REGISTRY: Final = OperationRegistry()


def get_operation_registry() -> OperationRegistry:
    """The process's registry."""
    return _REGISTRY
