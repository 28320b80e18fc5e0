"""What an operator may do: switch the authority, and move parked transactions on; each is journaled before it acts."""

from __future__ import annotations

from typing import Any, TypeVar

from spine.governance.authority import BYPASS_DEFAULT_S, GovernanceMode, GovernanceState
from spine.governance.operations import SwitchGovernance
from spine.governance.parking import ResolveTransaction, RetryTransaction
from spine.kernel.messages import Request

T = TypeVar("T")


class Operating:
    """The operator's messages, sent through the spine mailbox like everything else.

    Each raises ``ConfigurationError`` for an empty reason or actor, and ``JournalUnavailable`` when not recorded:
    then it does not act.
    """

    async def ask(self, request: Request[T]) -> T:
        """Send a request through the spine mailbox."""
        raise TypeError(f"{type(self).__name__} does not say how it asks {type(request).__name__}")

    async def bypass(self, *, reason: str, actor: str, for_s: float = BYPASS_DEFAULT_S) -> GovernanceState:
        """Let operations run unjudged and tagged for ``for_s`` seconds (at most 4 h); restores itself."""
        return await self.ask(SwitchGovernance(GovernanceMode.BYPASSED, reason, actor, for_s))

    async def degrade(self, *, reason: str, actor: str) -> GovernanceState:
        """Refuse new runs; existing ones go on, flagged."""
        return await self.ask(SwitchGovernance(GovernanceMode.DEGRADED, reason, actor))

    async def halt(self, *, reason: str, actor: str) -> GovernanceState:
        """Let nothing new run."""
        return await self.ask(SwitchGovernance(GovernanceMode.HALTED, reason, actor))

    async def restore(self, *, reason: str, actor: str) -> GovernanceState:
        """Govern normally again; after a bypass the state lists what would have been denied."""
        return await self.ask(SwitchGovernance(GovernanceMode.ACTIVE, reason, actor))

    async def resolve(self, tx_id: str, *, evidence: str, reason: str, actor: str) -> dict[str, Any]:
        """End a parked transaction that was undone by hand; what it is then, and its domains."""
        return await self.ask(ResolveTransaction(tx_id, evidence, reason, actor))

    async def retry(self, tx_id: str, *, reason: str, actor: str) -> dict[str, Any]:
        """Have a parked transaction's rollbacks tried again, by whichever Spine declares its domains."""
        return await self.ask(RetryTransaction(tx_id, reason, actor))
