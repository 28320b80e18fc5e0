"""Which actor answers which request, and what a caller gets when the spine mailbox could not take it in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spine.governance.authority import AuthorityDecision, GovernanceState
from spine.governance.contract import Acknowledge, ReconcileRun
from spine.governance.facade import CreatePolicyEvaluation, EmitLesson
from spine.governance.operations import (
    Execute,
    OperationResult,
    Ping,
    RegistryStatus,
    StartRun,
    SwitchGovernance,
    ungoverned,
)
from spine.governance.parking import ResolveTransaction, RetryTransaction
from spine.governance.transactions import CompleteRun, TransactionFailed, TransactionPhase
from spine.kernel.errors import DeadlineExceeded, JournalError, MailboxClosed, Overloaded, SpineError
from spine.kernel.messages import Envelope, Request

# The errors of a request that no actor answered, and the code a governed ending carries for each.
CODES: Mapping[type[SpineError], str] = {
    Overloaded: "OVERLOADED",
    DeadlineExceeded: "TIMEOUT",
    MailboxClosed: "INTERRUPTED",
    JournalError: "JOURNAL_UNAVAILABLE",
}
UNANSWERED = (Overloaded, DeadlineExceeded, MailboxClosed)
RECIPIENTS: Mapping[type, str] = {
    Execute: "registry",
    StartRun: "registry",
    SwitchGovernance: "registry",
    RegistryStatus: "registry",
    Ping: "registry",
    CompleteRun: "coordinator",
    CreatePolicyEvaluation: "coordinator",
    EmitLesson: "coordinator",
    ResolveTransaction: "coordinator",
    RetryTransaction: "coordinator",
    Acknowledge: "coordinator",
    ReconcileRun: "audit",
}


class Posted:
    """A request on its way; ``cancel`` keeps it from starting."""

    __slots__ = ("_envelope",)

    def __init__(self, envelope: Envelope | None) -> None:
        self._envelope = envelope

    def cancel(self) -> None:
        """Stop waiting: work that has not started will not start, started work ends and is recorded."""
        if self._envelope is not None:
            self._envelope.exchange.cancel(self._envelope)


def governed(
    request: Request[Any], error: SpineError, state: GovernanceState | None = None
) -> OperationResult | AuthorityDecision | BaseException:
    """What the caller gets when no actor answered: the mailbox was full or closed, or the time was up."""
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), "INTERRUPTED")
    match request:
        case Execute():
            return ungoverned(str(request.operation), str(error), code, state or GovernanceState())
        case StartRun():
            return AuthorityDecision.deny(str(error), code)
        case CompleteRun():
            # Only what was not admitted is known not to have begun.
            phase = TransactionPhase.NOT_STARTED if isinstance(error, Overloaded) else TransactionPhase.FAILED
            return TransactionFailed(str(error), phase, cause=error, code=code)
        case _:
            return error
