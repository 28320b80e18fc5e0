"""What an operator may do with a transaction whose rollback is parked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spine.governance.params import id_problem, text_problem
from spine.kernel.errors import ConfigurationError
from spine.kernel.messages import Request

EVIDENCE_MOST = 4_000


@dataclass(slots=True)
class ResolveTransaction(Request[dict[str, Any]]):
    """Asks the coordinator to end a parked transaction that was undone by hand, on ``evidence``."""

    tx_id: str
    evidence: str
    reason: str
    actor: str


@dataclass(slots=True)
class RetryTransaction(Request[dict[str, Any]]):
    """Asks the coordinator to have a parked transaction's rollbacks tried again."""

    tx_id: str
    reason: str
    actor: str


def validate(request: ResolveTransaction | RetryTransaction) -> None:
    """Raise ConfigurationError naming the field that is wrong."""
    problem = id_problem("transaction", request.tx_id) or id_problem("actor", request.actor)
    texts = {"reason": request.reason}
    if isinstance(request, ResolveTransaction):
        texts["evidence"] = request.evidence
    for name, value in texts.items():
        if not isinstance(value, str):
            problem = problem or f"{name} must be text, not {type(value).__name__}"
        elif not value.strip():
            problem = problem or f"{name} {value!r} is empty: say it in words"
        elif len(value) > EVIDENCE_MOST:
            problem = problem or f"{name} has {len(value)} characters, at most {EVIDENCE_MOST} are taken"
        elif wrong := text_problem(value):
            problem = problem or f"{name} {wrong}"
    if problem:
        raise ConfigurationError(problem)
