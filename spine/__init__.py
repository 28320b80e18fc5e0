"""Spine: the single runtime authority of a Python backend.

The public names load on first use, so that ``spine --help`` does not pay for what only a running Spine needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spine.domains import Local as Local
    from spine.domains import Refused as Refused
    from spine.domains import RunFacts as RunFacts
    from spine.effects import Effect as Effect
    from spine.effects import External as External
    from spine.effects import Post as Post
    from spine.governance.authority import AuthorityDecision as AuthorityDecision
    from spine.governance.authority import GovernanceState as GovernanceState
    from spine.governance.contract import ContractError as ContractError
    from spine.governance.contract import Reconciliation as Reconciliation
    from spine.governance.operations import OperationContext as OperationContext
    from spine.governance.operations import OperationResult as OperationResult
    from spine.governance.transactions import CompletionConflict as CompletionConflict
    from spine.governance.transactions import RollbackNotSupportedError as RollbackNotSupportedError
    from spine.governance.transactions import TransactionFailed as TransactionFailed
    from spine.governance.transactions import TransactionPhase as TransactionPhase
    from spine.governance.transactions import TransactionResult as TransactionResult
    from spine.governance.units import Write as Write
    from spine.kernel.errors import SpineError as SpineError
    from spine.publisher import Event as Event
    from spine.publisher import Publisher as Publisher
    from spine.runtime import Spine as Spine
    from spine.settings import Retry as Retry
    from spine.settings import Settings as Settings

_HOMES = {
    "AuthorityDecision": "spine.governance.authority",
    "CompletionConflict": "spine.governance.transactions",
    "ContractError": "spine.governance.contract",
    "Effect": "spine.effects",
    "Event": "spine.publisher",
    "External": "spine.effects",
    "GovernanceState": "spine.governance.authority",
    "Local": "spine.domains",
    "OperationContext": "spine.governance.operations",
    "OperationResult": "spine.governance.operations",
    "Post": "spine.effects",
    "Publisher": "spine.publisher",
    "Reconciliation": "spine.governance.contract",
    "Refused": "spine.domains",
    "Retry": "spine.settings",
    "RollbackNotSupportedError": "spine.governance.transactions",
    "RunFacts": "spine.domains",
    "Settings": "spine.settings",
    "Spine": "spine.runtime",
    "SpineError": "spine.kernel.errors",
    "TransactionFailed": "spine.governance.transactions",
    "TransactionPhase": "spine.governance.transactions",
    "TransactionResult": "spine.governance.transactions",
    "Write": "spine.governance.units",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605  one list of names, not two


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
