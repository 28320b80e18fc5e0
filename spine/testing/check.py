"""``check_domain``: a user's domain through every clause of the participant contract."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from spine.built_in import BuiltIn
from spine.domains import RunFacts
from spine.effects import reversible
from spine.governance.transactions import DomainClass
from spine.kernel.errors import ConfigurationError
from spine.parts import part_of
from spine.testing.bench import Bench, Broken, Live, Unseen
from spine.testing.contract import CONTRACT
from spine.testing.report import ContractViolated, Finding, Report

FACTS: Final = RunFacts("check-domain", "check-domain", "succeeded", "", 1_767_225_600_000_000, operations=1)
_DECLARED: Final = Finding(
    "declared",
    "the domain takes part in one way, can be called as Spine calls it, and undone if it acts before the commit",
    remedy="mend the declaration: a Spine with this domain does not start, or does not complete a run",
)


async def check_domain(
    domain: object,
    *,
    live: Live | None = None,
    facts: RunFacts | None = None,
    refused: RunFacts | None = None,
    restarted: Callable[[], object] | None = None,
    seed: str | None = None,
) -> Report:
    """Call ``domain`` as Spine would on a bad day, and report which clauses of the participant contract were kept.

    It acts on the other system for real, under effect ids of its own, and rolls back what it did: use one for tests.
    ``live(effect)`` is asked of the other system, not of the domain: how many effects of ``effect.id`` it holds (True
    is one, but does not tell one from two). ``facts`` are of a completion that the domain accepts (the check gives each
    a transaction of its own), ``refused`` of one that it refuses. ``restarted()`` makes the domain anew, as the next
    process would. What could not be checked without these is in the report's ``unchecked``, never in its ``passed``.
    ``seed`` repeats effect ids. Each call ends within the domain's ``timeout_s`` and 1 s.

    Raises ContractViolated naming every broken clause, ConfigurationError naming the argument that is of no use.
    """
    for what, given in (("facts", facts), ("refused", refused)):
        if given is not None and not isinstance(given, RunFacts):
            raise ConfigurationError(f"{what}= must be RunFacts, not {type(given).__name__}")
    seed = uuid.uuid4().hex if seed is None else seed
    name = str(getattr(domain, "name", domain))
    try:
        cls = _declared(domain)
    except (Broken, ConfigurationError) as error:
        raise ContractViolated(Report(name, None, seed, (), (), (replace(_DECLARED, detail=str(error)),))) from error
    bench = Bench(domain, cls, seed, facts or FACTS, facts is None, refused, live, restarted)
    try:
        report = await _run(bench, name)
    finally:
        await bench.close()
    if report.violated:
        raise ContractViolated(report)
    return report


def _declared(domain: object) -> DomainClass:
    cls = part_of(domain).cls
    if isinstance(domain, BuiltIn):
        raise Broken("it is built in: Spine's own tests check it")
    if cls is DomainClass.EXTERNAL and not reversible(domain):
        raise Broken("it has no rollback(effect), so a completion with it is refused with RollbackNotSupportedError")
    for method in ("plan", "describe", "forward", "rollback", "status", "post"):
        found = getattr(domain, method, None)
        if found is None:
            continue
        try:
            inspect.signature(found).bind(None)
        except ValueError:
            continue
        except TypeError as error:
            raise Broken(f"{method} cannot be called with one argument: {error}") from error
    return cls


async def _run(bench: Bench, name: str) -> Report:
    passed = [Finding(_DECLARED.clause, _DECLARED.promise)]
    unchecked: list[Finding] = []
    violated: list[Finding] = []
    # What stands on what is broken says nothing of its own: by name, the clause that is broken.
    fallen: dict[str, str] = {}
    for clause in CONTRACT[bench.cls]:
        bench.notes.clear()
        bench.touched.clear()
        if under := [fallen[other] for other in clause.rests_on if other in fallen]:
            fallen[clause.name] = under[0]
            unchecked.append(Finding(clause.name, clause.promise, f"it rests on {under[0]}, which is broken"))
            continue
        try:
            await clause.check(bench)
        except Unseen as why:
            bench.notes.append(str(why))
        except Broken as what:
            fallen[clause.name] = clause.name
            violated.append(Finding(clause.name, clause.promise, str(what), clause.remedy))
            continue
        bench.sound.update(bench.touched)
        why_not = "; ".join(dict.fromkeys(bench.notes))
        (unchecked if why_not else passed).append(Finding(clause.name, clause.promise, why_not))
    return Report(name, bench.cls, bench.seed, tuple(passed), tuple(unchecked), tuple(violated))
