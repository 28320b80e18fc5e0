"""The predecessor's transaction coordinator module: the canonical objects, asked through the blocking bridge."""

from __future__ import annotations

from typing import Final

from compat.bridge import BRIDGE
from spine.governance.transactions import (
    RAC_ROLLBACK_AUDIT_ENABLED,
    TRANSACTION_COORDINATOR_ENABLED,
    DomainResult,
    RollbackAction,
    RollbackNotSupportedError,
    RunCompletionTransaction,
    TransactionFailed,
    TransactionPhase,
    TransactionResult,
)

__all__ = [
    "RAC_ROLLBACK_AUDIT_ENABLED",
    "TRANSACTION_COORDINATOR_ENABLED",
    "DomainResult",
    "RollbackAction",
    "RollbackNotSupportedError",
    "RunCompletionTransaction",
    "TransactionFailed",
    "TransactionPhase",
    "TransactionResult",
    "create_transaction_coordinator",
    "get_transaction_coordinator",
]


def create_transaction_coordinator() -> RunCompletionTransaction[TransactionResult]:
    """A coordinator of the caller's own; all of them ask the same spine mailbox."""
    return RunCompletionTransaction(BRIDGE.ask)


_COORDINATOR: Final = create_transaction_coordinator()


def get_transaction_coordinator() -> RunCompletionTransaction[TransactionResult]:
    """The process's coordinator: ``execute(...)`` blocks until the run is completed or refused."""
    return _COORDINATOR
