"""The verdict over a run's contract as a record: pure functions from the run's rows and what a unit adds to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from spine.explain.contract import Contract, read_contract, take
from spine.explain.story import JournalRow
from spine.governance.contract import Finding, Reconciliation, reconcile, unmet
from spine.governance.units import Record


def judge(contract: Contract, at: int) -> tuple[Reconciliation, Record | None]:
    """The verdict at ``at`` (unix microseconds), and its record if it is not what the contract stands at already."""
    found = reconcile(contract.dues, contract.acks, at)
    if not contract.dues or (found.standing, found.due_at) == (contract.standing, contract.due_at):
        return found, None
    fields = {
        "run_id": contract.run_id,
        "tenant_id": contract.tenant_id,
        **found.to_dict(),
        "overall": found.standing,
        "was": contract.standing,
        "due_at": found.due_at,
        # The row that this verdict replaces; none where the run starts in the same unit.
        "previous": contract.seq,
    }
    return found, Record("contract.reconciled", at, fields)


def with_verdict(records: Sequence[Record], rows: Iterable[JournalRow], *, at: int) -> list[Record]:
    """The records of a unit about one run, with the verdict they bring about, if it is another one than before.

    ``rows`` are the run's own in the journal, in order; none for a run that starts in this unit. The verdict is as of
    ``at`` (unix microseconds). Where somebody judged the run meanwhile, or reported of it, the unit's commit fails on
    ``contract verdict``: read the rows again.
    """
    contract = read_contract(rows)
    for record in records:
        contract = take(contract, record.kind, record.fields, at=record.at)
    if contract is None:
        return list(records)
    verdict = judge(contract, at)[1]
    if verdict is None:
        return _noticed(records, contract)
    return [*(_judged(record) for record in records), verdict]


def _noticed(records: Sequence[Record], contract: Contract) -> list[Record]:
    """The records; the last report among them says which row told of the contract when they were judged.

    A report that changes no verdict may still decide it, together with another one: nobody may overlook it.
    """
    found = list(records)
    last = max((n for n, record in enumerate(found) if record.kind == "ack"), default=None)
    if last is not None and contract.seq is not None and contract.kept:
        found[last] = replace(found[last], fields={**found[last].fields, "contract": contract.seq})
    return found


def _judged(record: Record) -> Record:
    """A start whose contract is judged in its own unit leaves nothing to judge later: the verdict tells when."""
    return replace(record, fields={**record.fields, "due_at": None}) if record.kind == "run.started" else record


def lacking(rows: Iterable[JournalRow], taking_part: Collection[tuple[str, str]]) -> tuple[Finding, ...]:
    """What keeps the run of these rows from being committed; nothing unless it was started with ``block_unmet``.

    ``taking_part`` are the (domain, action) that the completion itself acknowledges.
    """
    contract = read_contract(rows)
    if contract is None or not contract.block_unmet:
        return ()
    return unmet(contract.dues, contract.acks, taking_part)
