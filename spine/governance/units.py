"""The unit of work as data: the records and writes that one commit takes together, and how that commit may end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(slots=True)
class Record:
    """One fact for the journal.

    ``fields`` is the body without ``kind``, ``at`` and ``unit``, which the writer adds; ``at`` is unix microseconds.
    """

    kind: str
    at: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Write:
    """One SQL statement of a LOCAL domain, with ``:name`` parameters and the row count it must change.

    ``rows=None`` accepts any count. A different count fails the whole unit: nothing of it is written.
    """

    sql: str
    params: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = 1


@dataclass(slots=True)
class Unit:
    """What is committed together or not at all.

    ``epoch`` is the governance epoch the decision was made under; ``None`` binds the unit to no epoch.
    """

    id: str
    records: Sequence[Record]
    writes: Sequence[Write] = ()
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """The unit is durable as journal rows ``first`` to ``last`` (both included)."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class StaleEpoch:
    """Nothing was written: the governance state changed (now ``epoch``) after the decision; decide again."""

    epoch: int


# How guards are named: that of a user's statement and that of a record begin so, the contract's is this one.
WRITE_GUARD: Final = "write "
RECORD_GUARD: Final = "record: "
VERDICT_GUARD: Final = "contract verdict"


@dataclass(frozen=True, slots=True)
class GuardFailed:
    """Nothing was written: statement ``guard`` changed ``found`` rows where ``required`` were required.

    ``found`` is ``None`` for a user's statement that could not be run; ``guard`` then tells why.
    """

    guard: str
    required: int
    found: int | None

    @property
    def of_write(self) -> bool:
        """Whether a user's own statement did not change what it must."""
        return self.guard.startswith(WRITE_GUARD)

    @property
    def of_record(self) -> bool:
        """Whether what is to be recorded can never be."""
        return self.guard.startswith(RECORD_GUARD)

    @property
    def of_verdict(self) -> bool:
        """Whether somebody else judged the run's contract, or reported of it, meanwhile."""
        return self.guard == VERDICT_GUARD


@dataclass(frozen=True, slots=True)
class StorageFailed:
    """The database refused the unit; ``unknown`` tells that it may have taken it, or may still, all the same."""

    error: str
    unknown: bool = False

    def told(self, what: str) -> str:
        """What may be said of ``what``, which was to be recorded."""
        if self.unknown:
            return f"it is not known whether {what} was recorded: {self.error}"
        return f"{what} was not recorded: {self.error}"


CommitOutcome = Committed | StaleEpoch | GuardFailed | StorageFailed
