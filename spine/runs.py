"""A run from its start to its completion, and what is reported and asked about its contract meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from spine.governance.authority import AuthorityDecision
from spine.governance.contract import Acknowledge, ReconcileRun, Reconciliation
from spine.governance.operations import StartRun
from spine.governance.transactions import CompleteRun, TransactionResult
from spine.kernel.messages import Request

T = TypeVar("T")


class Runs:
    """The messages about runs, sent through the spine mailbox like everything else."""

    async def ask(self, request: Request[T]) -> T:
        """Send a request through the spine mailbox."""
        raise TypeError(f"{type(self).__name__} does not say how it asks {type(request).__name__}")

    async def start_run(
        self,
        run_id: str,
        *,
        tenant_id: str,
        agent_id: str | None = None,
        expectations: Sequence[tuple[str, str, float]] = (),
        block_unmet: bool = False,
    ) -> AuthorityDecision:
        """Begin a run; a denial is returned. ``expectations``, 200 at most, are (domain, action, deadline in seconds).

        With ``block_unmet`` the run commits only when everything promised is delivered.
        """
        promised_here = tuple(expectations) if isinstance(expectations, Sequence) else (expectations,)
        return await self.ask(StartRun(run_id, tenant_id, agent_id, promised_here, block_unmet))

    async def complete_run(
        self,
        run_id: str,
        *,
        tenant_id: str,
        run_status: str,
        agent_id: str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
        completion_key: str = "",
    ) -> TransactionResult:
        """Complete a run, every domain or none; raises ``TransactionFailed`` or ``CompletionConflict``."""
        request = CompleteRun(
            run_id=run_id,
            tenant_id=tenant_id,
            run_status=run_status,
            agent_id=agent_id,
            error_code=error_code,
            error_message=error_message,
            completion_key=completion_key,
        )
        return await self.ask(request)

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

        The last word counts: FAILED and ROLLED_BACK take back the SUCCESS with the same ``result_id``, or every one
        where they name none. Domains that take part in completions acknowledge by that alone. Raises ``ContractError``
        for a run, a domain or a value that is not taken, and ``JournalError``.
        """
        await self.ask(Acknowledge(run_id, tenant_id, domain, action, status, result_id, error))

    async def reconcile(self, run_id: str) -> Reconciliation:
        """Compare what the run promised with what was acknowledged until now; a changed verdict is recorded.

        Raises ``ContractError`` for a run that was never started, and ``JournalError``.
        """
        return await self.ask(ReconcileRun(run_id))
