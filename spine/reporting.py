"""What is reported and asked about a run's contract."""

from __future__ import annotations

from typing import TypeVar

from spine.governance.contract import Acknowledge, ReconcileRun, Reconciliation
from spine.kernel.messages import Request

T = TypeVar("T")


class Reporting:
    """The two requests about what runs promised, sent through the spine mailbox like everything else.

    Both raise ``ContractError`` for a run or a value that is not taken, and ``JournalError``.
    """

    async def ask(self, request: Request[T]) -> T:
        """Send a request through the spine mailbox."""
        raise TypeError(f"{type(self).__name__} does not say how it asks {type(request).__name__}")

    async def acknowledge(
        self,
        run_id: str,
        *,
        tenant_id: str,
        domain: str,
        action: str,
        status: str = "SUCCESS",
        result_id: str | None = None,
        error: str | None = None,
    ) -> None:
        """Record what ``domain`` reports of ``action``; ``status`` is SUCCESS, FAILED or ROLLED_BACK.

        ROLLED_BACK takes back the SUCCESS that was reported with the same ``result_id``.
        """
        await self.ask(Acknowledge(run_id, tenant_id, domain, action, status, result_id, error))

    async def reconcile(self, run_id: str) -> Reconciliation:
        """Compare what the run promised with what was acknowledged until now; a changed verdict is recorded."""
        return await self.ask(ReconcileRun(run_id))
