"""What an operator should do now, in one sentence, from the verdict and its cause."""

from __future__ import annotations

from spine.explain.cause import Cause, decisive_denial, failed_domain
from spine.explain.story import ABORTED_STATES, COMMITTED, PARKED, JournalRow, Story, items_of, text_of
from spine.governance.transactions import DomainClass

_RESTORE = "run: spine restore --reason WHY --actor YOU, then start the run again"
_DENIAL_REMEDIES = {
    "DEGRADED_NEW_RUN": "New runs are refused while the authority is degraded; when its cause is gone, "
    + _RESTORE
    + ".",
    "HALTED": "Nothing new runs while the authority is halted; when its cause is gone, " + _RESTORE + ".",
    "TENANT_MISMATCH": "Call with the tenant that the run belongs to.",
    "UNKNOWN_OPERATION": "Register the operation before the Spine starts, or correct its name (see spine ops).",
    "INVALID_PARAMS": "Correct the parameters that the reason names, and call again.",
    "OVERLOADED": "Call again with wait=True, or with fewer callers at once.",
    "IDEMPOTENCY_CONFLICT": "Use a new idempotency key: this one was used with other parameters.",
    "IN_DOUBT": "Find out whether the interrupted call took effect; only then call again, under a new idempotency key.",
    "JOURNAL_UNAVAILABLE": "Make the database writable again (space, permissions, connection), and call again.",
}
_COMPLETE = "complete the run: complete_run(run_id, tenant_id=..., run_status=...)."
_REFUSAL_REMEDIES = {
    "COORDINATOR_DISABLED": "Switch the transaction coordinator on (TRANSACTION_COORDINATOR_ENABLED=true), start the "
    "application again, and ",
    "DOMAIN_PARKED": "Repair the domain and resolve its parked rollback (spine parked lists it), and ",
    "ROLLBACK_NOT_SUPPORTED": "Give the domain a rollback(effect), or make it a POST domain, and ",
}


def next_step(story: Story, verdict: str, cause: Cause, *, intact: bool | None) -> str:
    """Return one sentence, or a command, for the operator who reads the explanation."""
    if intact is False:
        return "Trust no line above until this is cleared up: spine verify names every row that was changed."
    match verdict:
        case "parked":
            return _after_parking(story)
        case "rolled_back":
            return _after_rollback(story)
        case "denied":
            return _after_denial(story)
        case "failed":
            return _after_failure(cause)
        case "succeeded":
            waiting = " and ".join(_undelivered(story))
            return f"Nothing to do{', but ' if waiting else ''}{waiting}."
        case _:
            return _while_pending(story, cause)


def _after_rollback(story: Story) -> str:
    attempt = story.in_state(*ABORTED_STATES)
    ended = attempt.ended.body if attempt is not None and attempt.ended is not None else {}
    if attempt is not None and attempt.state == "ABORTED_MANUAL":
        return "Complete the run again, if it still matters: an operator has undone this attempt by hand."
    if ended.get("interrupted") is True:
        return "Complete the run again: only the end of a process undid this attempt, and nothing of it persists."
    return f"Repair domain {_domain(story)} and complete the run again: nothing of this attempt persists."


def _undelivered(story: Story) -> list[str]:
    """Who has not got yet what was committed for it: the publisher, and the domains that act after the commit."""
    steps = [step for attempt in story.attempts.values() for _, step in sorted(attempt.steps.items())]
    posts = {step.effect_id: step.name or "unknown" for step in steps if step.cls == DomainClass.POST}
    waiting = [event_id for row in story.events if (event_id := text_of(row.body, "event_id")) not in story.published]
    names = [posts[event_id] for event_id in waiting if event_id in posts]
    told = len(waiting) - len(names)
    found = [f"{told} of its events {'waits' if told == 1 else 'wait'} for the publisher"] if told else []
    if names:
        domains = f"domain {names[0]} has" if len(names) == 1 else f"domains {', '.join(names)} have"
        found.append(f"POST {domains} yet to act")
    return found


def _after_parking(story: Story) -> str:
    attempt = story.in_state(PARKED)
    tx_id = attempt.tx_id if attempt is not None else "TX"
    return (
        f"Repair domain {_domain(story)} and run: spine resolve {tx_id} --retry --reason WHY --actor YOU; or undo it "
        f"by hand and run: spine resolve {tx_id} --evidence WHAT --reason WHY --actor YOU."
    )


def _domain(story: Story) -> str:
    attempt = story.in_state(PARKED) or story.in_state(*ABORTED_STATES)
    step = failed_domain(attempt)
    if step is not None and step.name is not None:
        return step.name
    ended = attempt.ended if attempt is not None else None
    return (text_of(ended.body, "failed_domain") if ended is not None else None) or "unknown"


def _after_denial(story: Story) -> str:
    row = decisive_denial(story)
    code = (text_of(row.body, "code") if row is not None else None) or "DENIED"
    known = _DENIAL_REMEDIES.get(code)
    if known is not None:
        return known
    rule = _determining_rule(row)
    if rule is None:
        return f"Change what the reason names, and {_again(story)}."
    if code == "RULE_ERROR":
        return f"Repair rule {rule}: it raised, and a rule that raises denies."
    return f"Change what rule {rule} objects to, or the rule itself, and {_again(story)}."


def _again(story: Story) -> str:
    if story.started is None:
        return "start the run again"
    return "run the task again under a new run id" if story.in_state(COMMITTED) else "repeat the operation"


def _determining_rule(row: JournalRow | None) -> str | None:
    for rule in items_of(row.body, "rules") if row is not None else []:
        if isinstance(rule, dict) and rule.get("determined") and rule.get("id"):
            version = rule.get("version")
            return f"{rule['id']} (version {version})" if version else str(rule["id"])
    return None


def _after_failure(cause: Cause) -> str:
    if cause.code.startswith("HANDLER_EXCEPTION"):
        return "Repair the operation's handler, which raised, and run the task again under a new run id."
    if cause.code == "TIMEOUT":
        return "Find out why the operation takes so long, or give it more time (timeout_s), and start a new run."
    return "Correct what the error names, and run the task again under a new run id."


def _while_pending(story: Story, cause: Cause) -> str:
    flying = [attempt for attempt in story.latest() if attempt.in_flight]
    if flying:
        outside = [step.name or "unknown" for _, step in sorted(flying[-1].steps.items()) if step.cls != "LOCAL"]
        return (
            "Wait: the process that holds the transaction finishes it, or the next one that declares its domains "
            f"({', '.join(outside) or 'none outside'})."
        )
    if story.refused_completion is not None:
        return _REFUSAL_REMEDIES.get(cause.code, "Correct what the cause names, and ") + _COMPLETE
    if story.open_decisions():
        return "Wait for the operation, or start the application again: recovery ends what a dead process left open."
    return _COMPLETE.capitalize()
