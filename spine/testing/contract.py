"""The participant contract as a table: every clause, what it rests on, and what to do where it is broken."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from spine.effects import CANCEL_GRACE_S
from spine.governance.transactions import DomainClass
from spine.testing import clauses, local
from spine.testing.bench import Bench


@dataclass(frozen=True, slots=True)
class Clause:
    """One promise of a domain; not checked where one it ``rests_on`` is broken. ``post``: of POST domains too."""

    name: str
    promise: str
    remedy: str
    check: Callable[[Bench], Awaitable[None]]
    rests_on: tuple[str, ...] = ()
    post: bool = False


_OUTSIDE: Final = (
    Clause(
        "descriptor",
        "what describes the effect is JSON, and no call changes it",
        "let describe(run) return plain JSON, and copy the descriptor before you change it: "
        "who recovers works with the recorded one",
        clauses.descriptor,
        post=True,
    ),
    Clause(
        "answers",
        "called for the first time it answers, within its timeout_s and its attempts",
        "see that the other system is there; if it refuses this completion, pass facts= of one that it accepts; "
        "if it needs longer, raise timeout_s",
        clauses.answers,
        ("descriptor",),
        post=True,
    ),
    Clause(
        "recordable",
        "what forward returns is a mapping of JSON, or None",
        "return plain JSON: finite numbers, texts, lists, and mappings with text keys",
        clauses.recordable,
        ("answers",),
    ),
    Clause(
        "loop",
        f"no call keeps the event loop to itself for {clauses.BLOCKED_S:g} s",
        "use an asynchronous client, or hand the blocking call to a thread: while it runs no deadline can be kept",
        clauses.loop,
        ("answers",),
        post=True,
    ),
    Clause(
        "status",
        "status says absent before the effect and applied after it",
        "answer from what the other system holds under effect.id, or leave status out",
        clauses.status,
        ("answers", "loop"),
    ),
    Clause(
        "repeated",
        "the same effect id again has no second effect and the same answer",
        "send effect.id as the idempotency key, have the other system keep it with the answer, and answer that again",
        clauses.repeated,
        ("answers", "loop"),
        post=True,
    ),
    Clause(
        "rollback",
        "an applied effect is undone",
        "undo what effect.id names, and return only when it is undone",
        clauses.rollback,
        ("answers", "loop"),
    ),
    Clause(
        "never_applied",
        "a rollback of what was never applied is accepted",
        "return where effect.id is not known, and keep a tombstone for it: its forward may still come",
        clauses.never_applied,
        ("answers", "loop"),
    ),
    Clause(
        "rollback_repeated",
        "a rollback that comes again is accepted and changes nothing",
        "return where the effect is undone already; undo by effect.id, never by an opposite action",
        clauses.rollback_repeated,
        ("rollback", "never_applied"),
    ),
    Clause(
        "tombstone",
        "a forward that comes after the rollback does not apply",
        "let rollback leave a tombstone under effect.id, and forward refuse where there is one",
        clauses.tombstone,
        ("rollback", "never_applied"),
    ),
    Clause(
        "tombstoned",
        "status says tombstoned after a rollback",
        "answer tombstoned where the tombstone is, whether or not the effect was ever applied",
        clauses.tombstoned,
        ("status", "tombstone"),
    ),
    Clause(
        "refusal",
        "a business no raises Refused; it can be rolled back, and its late duplicate does not apply",
        "raise Refused(code, reason) for a business no, and leave the tombstone for refused effects too",
        clauses.refusal,
        ("never_applied", "tombstone"),
    ),
    Clause(
        "independent",
        "another effect is not touched, not even another one of the same run",
        "let effect.id alone name the effect: a run may have several attempts, each with an id of its own",
        clauses.independent,
        ("repeated", "rollback"),
    ),
    Clause(
        "restart",
        "what was done is known to the other system, not only to this process",
        "keep idempotency keys and tombstones where the effect is, never in the domain's memory",
        clauses.restart,
        ("repeated", "tombstone"),
        post=True,
    ),
    Clause(
        "concurrent",
        "duplicates at the same time have one effect and one answer",
        "let the other system decide by a unique key on effect.id: to look before the act is not enough",
        clauses.concurrent,
        ("repeated", "restart"),
        post=True,
    ),
    Clause(
        "overtaken",
        "a rollback that overtakes a forward under way wins, wherever that forward is held up",
        "let the other system look for the tombstone in the transaction that applies the effect, not in a call before",
        clauses.overtaken,
        ("tombstone", "restart"),
    ),
    Clause(
        "cancellation",
        f"a call that is cancelled ends within {CANCEL_GRACE_S:g} s",
        "let CancelledError through, and clean up in `finally` without waiting long",
        clauses.cancellation,
        ("answers", "loop"),
        post=True,
    ),
    Clause(
        "crash",
        "cut off anywhere and called again, it has one effect and one answer",
        "have the other system take effect and idempotency key in one transaction, by one request",
        clauses.crash,
        ("cancellation", "concurrent"),
        post=True,
    ),
    Clause(
        "crash_undone",
        "cut off anywhere, a forward can be rolled back and stays away",
        "have forward act by one request, or let rollback undo every part of it",
        clauses.crash_undone,
        ("cancellation", "overtaken"),
    ),
    Clause(
        "crash_rollback",
        "cut off anywhere, a rollback that comes again undoes the effect",
        "have rollback undo and leave the tombstone in one transaction, or finish what was half undone",
        clauses.crash_rollback,
        ("cancellation", "rollback_repeated", "tombstone", "restart"),
    ),
    Clause(
        "settled",
        "what was rolled back is still gone at the end of the check",
        "let nothing that was under way, queued or scheduled apply once its tombstone is there",
        clauses.settled,
        ("crash_undone", "crash_rollback"),
    ),
)
_LOCAL: Final = (
    Clause(
        "writes",
        "plan(run) gives a sequence of Write objects",
        "return [Write(sql, params), ...], () for none; if it refuses this completion, pass facts= of one it accepts",
        local.writes,
    ),
    Clause(
        "loop",
        f"plan(run) takes less than {clauses.BLOCKED_S:g} s",
        "let plan(run) only compute: it runs on the event loop, where it delays everybody",
        local.free,
        ("writes",),
    ),
    Clause(
        "pure",
        "the same facts have the same writes",
        "take ids from run.effect_id and times from run.completed_at, and read nothing that changes: "
        "a transaction is planned again when the ground moves under it",
        local.pure,
        ("loop",),
    ),
    Clause(
        "refusal",
        "a business no raises Refused",
        "raise Refused(code, reason) for a business no: anything else is recorded as a failure",
        local.refuses,
    ),
)
CONTRACT: Final = {
    DomainClass.EXTERNAL: _OUTSIDE,
    DomainClass.POST: tuple(clause for clause in _OUTSIDE if clause.post),
    DomainClass.LOCAL: _LOCAL,
}
