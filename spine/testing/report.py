"""What a check of a domain found: the clauses that passed, those that could not be checked, those that are broken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spine.governance.transactions import DomainClass
from spine.kernel.errors import SpineError


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one clause: ``detail`` says why it was not checked, or what happened."""

    clause: str
    promise: str
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The clauses of the participant contract by what became of them; each is in exactly one of the three.

    ``seed`` gives the same effect ids again, in the same order: for a system that has not seen them.
    """

    domain: str
    domain_class: DomainClass | None
    seed: str
    passed: tuple[Finding, ...]
    unchecked: tuple[Finding, ...]
    violated: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join([f"{_head(self)}:", *_told(self.violated), *_told(self.unchecked), *_told(self.passed)])


class ContractViolated(SpineError):
    """A domain breaks the participant contract; the text lists every broken clause, ``report`` holds them all."""

    def __init__(self, report: Report) -> None:
        told = "\n".join(_told([*report.violated, *report.unchecked]))
        super().__init__(f"{_head(report)}:\n{told}")
        self.report = report

    def __reduce__(self) -> tuple[type[ContractViolated], tuple[Report]]:
        return (type(self), (self.report,))


def _head(report: Report) -> str:
    kind = "" if report.domain_class is None else f" ({report.domain_class.value})"
    counts = f"{len(report.violated)} violated, {len(report.unchecked)} not checked, {len(report.passed)} passed"
    return f"the participant contract of domain {report.domain!r}{kind}, seed {report.seed}: {counts}"


def _told(findings: Iterable[Finding]) -> Iterable[str]:
    for found in findings:
        if found.remedy:
            yield f"  violated: {found.clause}: {found.promise}"
            yield f"    what happened: {found.detail}"
            yield f"    what to do: {found.remedy}"
        elif found.detail:
            yield f"  not checked: {found.clause}: {found.promise}"
            yield f"    because: {found.detail}"
        else:
            yield f"  passed: {found.clause}: {found.promise}"
