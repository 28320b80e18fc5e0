"""What the actors read back from the journal: the shapes of its rows, and where they are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spine.explain.story import JournalRow


class TransactionRow(Protocol):
    """Where an attempt to complete a run stands."""

    @property
    def tx_id(self) -> str: ...
    @property
    def run_id(self) -> str: ...
    @property
    def tenant_id(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def previous(self) -> str | None: ...
    @property
    def state(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def instance(self) -> str: ...
    @property
    def seq_begun(self) -> int: ...
    @property
    def seq_ended(self) -> int | None: ...


class ContractRows(Protocol):
    """Where the rows of one contract are read."""

    async def contract_rows(self, run_id: str) -> Sequence[JournalRow]:
        """The run's rows that tell of its contract, in order."""
        ...


class RunRows(Protocol):
    """Where the rows of one run are read."""

    async def run_rows(self, run_id: str, *kinds: str) -> Sequence[JournalRow]:
        """The rows of the run in order; of these kinds if some are named."""
        ...


class Transactions(RunRows, Protocol):
    """Where one transaction is read."""

    async def transaction_by_id(self, tx_id: str) -> TransactionRow | None:
        """The attempt with this id."""
        ...
