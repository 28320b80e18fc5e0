"""Records of a run are committed with the verdict they bring about, anew as long as others had a word in between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from actors.rows import ContractRows
from actors.verdicts import with_verdict
from spine.explain.story import JournalRow
from spine.governance.units import GuardFailed, Record
from spine.kernel.errors import JournalBroken

# Whoever judged a run meanwhile has left a row: so often the same rows may be read after a verdict was not taken.
IN_VAIN_MOST = 3

Outcome = TypeVar("Outcome")


async def judged(
    run_id: str,
    records: Sequence[Record],
    source: ContractRows,
    commit: Callable[[list[Record]], Awaitable[Outcome]],
    now_us: Callable[[], int],
) -> Outcome:
    """Have the records committed by ``commit``, with the verdict over the run as of ``now_us`` (unix microseconds).

    Gives the outcome, which is no failed guard ``of_verdict``. Raises JournalError when the contract cannot be read,
    JournalBroken when no verdict fits it.
    """
    overtaken = Overtaken(run_id)
    while True:
        rows = await source.contract_rows(run_id)
        outcome = await commit(with_verdict(records, rows, at=now_us()))
        if not (isinstance(outcome, GuardFailed) and outcome.of_verdict):
            return outcome
        overtaken.by(rows)


class Overtaken:
    """Tells a verdict that somebody else's came before from one that the journal will never take."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._last, self._in_vain = -1, 0

    def by(self, rows: Sequence[JournalRow]) -> None:
        """Judge anew after these rows were judged in vain; raises JournalBroken where nothing comes of it."""
        last = rows[-1].seq if rows else 0
        self._in_vain = self._in_vain + 1 if last == self._last else 1
        self._last = last
        if self._in_vain == IN_VAIN_MOST:
            raise JournalBroken(
                f"the contract of run {self._run_id!r} does not stand where its journal rows say: run `spine verify`"
            )
