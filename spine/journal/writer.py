"""Group commit: many units of work, one SQL transaction, one thread hop, and an answer for each after COMMIT."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from spine.governance.units import (
    RECORD_GUARD,
    WRITE_GUARD,
    CommitOutcome,
    Committed,
    GuardFailed,
    StorageFailed,
    Unit,
    Write,
)
from spine.journal.batch import Encoded, Head, Plan, encode, plan
from spine.journal.chain import STREAM
from spine.journal.engine import Target, parse_url, unavailable
from spine.journal.faults import (
    CommitUnknown,
    StorageError,
    UnitFault,
    cause,
    is_database,
    is_passing,
    is_storage,
    is_unit,
)
from spine.journal.lease import Lease
from spine.journal.session import Session
from spine.journal.thread import Worker
from spine.kernel.errors import JournalError

_LOOKUP_IDS: Final = 400
_FIND_UNITS: Final = (
    f"SELECT unit, min(seq), max(seq) FROM journal WHERE stream = '{STREAM}' AND seq > ? "
    "AND unit IN ({}) GROUP BY unit"
)
_ROW_HASH: Final = f"SELECT hash FROM journal WHERE stream = '{STREAM}' AND seq = ?"


class GroupCommit:
    """The writing itself, for one thread: it knows no event loop.

    It remembers where the chain ended, so that a batch is hashed before the database is locked; if another process
    has written since, the batch is hashed again behind that.
    """

    def __init__(self, target: Target, *, busy_timeout_ms: int, checkpoint_pages: int) -> None:
        self._target = target
        self._session = Session(target, busy_timeout_ms)
        self._checkpoint_pages = checkpoint_pages
        self._pages = 0
        self._head: Head | None = None
        self._size = 0
        self._lease: Lease | None = None

    def open(self) -> None:
        """Connect, make the schema if there is none, and read the head. Raises JournalError."""
        try:
            self._session.connect(create=True)
            self._remember(self._session.read_head(lock=False))
        except JournalError:
            self._session.close()
            raise
        except Exception as error:
            self._session.close()
            if is_storage(error):
                raise unavailable(self._target, error) from error
            raise

    def close(self) -> None:
        """Copy the log back if possible and disconnect."""
        self._copy_back()
        self._session.close()

    def commit(self, units: Sequence[Unit]) -> list[CommitOutcome]:
        """Write ``units`` together; where one of them is at fault, each on its own. One outcome for each, in order."""
        # Before the batch: nothing may come between a commit and its answers.
        self._renew_lease()
        encoded = [encode(unit) for unit in units]
        outcomes = iter(self._commit([unit for unit in encoded if isinstance(unit, Encoded)]))
        result = [unit if isinstance(unit, GuardFailed) else next(outcomes) for unit in encoded]
        if self._pages >= self._checkpoint_pages:
            self._copy_back()
        return result

    def _commit(self, units: Sequence[Encoded]) -> list[CommitOutcome]:
        if not units:
            return []
        try:
            return self._transaction(units)
        except UnitFault as fault:
            if len(units) == 1:
                return [fault.failed]
        except StorageError as error:
            return [StorageFailed(str(error), error.unknown)] * len(units)
        outcomes: list[CommitOutcome] = []
        for place, unit in enumerate(units, start=1):
            outcomes += self._commit([unit])
            if isinstance(outcomes[-1], StorageFailed):
                # Waiting for the same lock or disk once more for each unit would only keep the rest from their answer.
                outcomes += [StorageFailed(outcomes[-1].error)] * (len(units) - place)
                break
        return outcomes

    def _transaction(self, units: Sequence[Encoded]) -> list[CommitOutcome]:
        """One SQL transaction for all of ``units``. Raises UnitFault or StorageError; then nothing is written."""
        session = self._session
        made: Plan | None = None
        try:
            if not session.connected:
                session.connect(create=False)
            made = self._write(units)
            if made.rows:
                session.commit()
            self._remember(made.head)
        except CommitUnknown as error:
            return self._resolve(made, str(error))
        except UnitFault:
            self._undo()
            raise
        except Exception as error:
            self._undo(keep=is_passing(error))
            self._head = None
            if not is_database(error):
                raise
            if is_unit(error):
                raise UnitFault(f"commit: {error}", 1, 0) from error
            raise StorageError(f"the journal at {self._target.name} did not take the record: {cause(error)}") from error
        self._pages += 6 + len(made.rows) * 2 // 3
        return made.outcomes

    def _write(self, units: Sequence[Encoded]) -> Plan:
        """Everything but the COMMIT; no transaction is open afterwards if every unit was stale."""
        session, head = self._session, self._head
        made = plan(units, head) if head is not None else None
        if made is not None and not made.rows:
            return made
        session.begin()
        if head is None or made is None or not session.move_head(head, made.size, made.hash):
            current = session.read_head(lock=True)
            if current.size < self._size:
                raise StorageError(
                    f"the journal went back from row {self._size} to row {current.size}: it was restored or cut while "
                    "in use; run `spine verify` and start again"
                )
            self._remember(current)
            made = plan(units, current)
            if not made.rows:
                session.rollback()
                return made
            if not session.move_head(current, made.size, made.hash):
                raise StorageError("the journal's head changed while it was locked; run `spine verify`")
        try:
            session.insert_rows(made.rows)
            for statement, rows in made.waves:
                session.change(statement, rows)
        except Exception as error:
            if is_unit(error):
                raise UnitFault(f"{RECORD_GUARD}{error}", 1, 0) from error
            raise
        for number, write in enumerate(made.writes):
            self._user_write(number, write)
        if made.writes and not session.in_transaction:
            raise StorageError("a domain's write ended the transaction it was part of; run `spine verify`")
        return made

    def _user_write(self, number: int, write: Write) -> None:
        try:
            found = self._session.write(write)
        except Exception as error:
            if is_storage(error):
                raise
            reason = f"parameter {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UnitFault(f"{WRITE_GUARD}{number}: {reason}", write.rows or 0, None) from error
        if write.rows is not None and found != write.rows:
            raise UnitFault(f"{WRITE_GUARD}{number}: {write.sql}", write.rows, found)

    def _resolve(self, made: Plan | None, error: str) -> list[CommitOutcome]:
        """Look a lost COMMIT up: the head is locked first, so a server still at work on it has ended when we read."""
        self._undo(keep=False)
        self._head = None
        try:
            session = self._session
            session.connect(create=False)
            session.begin()
            head = session.read_head(lock=True)
            found = session.execute(_ROW_HASH, (made.size if made is not None else 0,))
            session.rollback()
        except Exception as reason:
            self._undo(keep=False)
            message = f"COMMIT was not confirmed ({error}) and the journal could not be asked: {reason}"
            raise StorageError(message, unknown=True) from reason
        self._remember(head)
        if made is not None and found and bytes(found[0][0]) == made.hash:
            return made.outcomes
        raise StorageError(f"COMMIT failed: {error}")

    def _undo(self, *, keep: bool = True) -> None:
        """Roll back; give the connection up unless it is to be kept and still works."""
        try:
            self._session.rollback()
        except Exception:  # noqa: BLE001  a connection that cannot roll back is given up, and the server rolls back
            keep = False
        if not keep:
            self._session.discard()

    def _remember(self, head: Head) -> None:
        self._head, self._size = head, head.size

    def find_units(self, ids: Sequence[str], since_seq: int) -> dict[str, Committed]:
        """Which of the units are in the journal after row ``since_seq``. Raises JournalUnavailable."""
        found: dict[str, Committed] = {}
        with self._own_statement() as session:
            for at in range(0, len(ids), _LOOKUP_IDS):
                some = ids[at : at + _LOOKUP_IDS]
                rows = session.execute(_FIND_UNITS.format(",".join("?" * len(some))), (since_seq, *some))
                found.update((unit, Committed(first, last)) for unit, first, last in rows)
        return found

    def keep_lease(self, lease: Lease) -> None:
        """Say that its instance lives, and go on saying so. Raises JournalUnavailable; it goes on all the same."""
        self._lease = lease
        with self._own_statement() as session:
            lease.renew(session)

    def release_lease(self) -> None:
        """Give the lease back, if there is one. Raises JournalUnavailable."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with self._own_statement() as session:
                lease.release(session)

    def _renew_lease(self) -> None:
        """Here and not on the event loop: a blocked loop does not make its process a dead one."""
        lease = self._lease
        if lease is None:
            return
        try:
            if lease.abandoned():
                self.release_lease()
            elif lease.due:
                with self._own_statement() as session, session.impatient():
                    lease.renew(session)
        except JournalError:
            # It is tried again soon; whether the database takes anything is told by commits.
            return

    @contextmanager
    def _own_statement(self) -> Iterator[Session]:
        try:
            if not self._session.connected:
                self._session.connect(create=False)
            yield self._session
        except Exception as error:
            self._undo(keep=is_passing(error))
            if isinstance(error, JournalError):
                raise
            raise unavailable(self._target, error) from error

    def idle(self) -> bool:
        """Copy the log back and renew the lease; whether to do so again soon."""
        left = self._copy_back()
        self._renew_lease()
        return left or self._lease is not None

    def _copy_back(self) -> bool:
        """Copy the log back; whether there is still something to copy."""
        if not self._pages:
            return False
        try:
            ran = self._session.checkpoint(self._checkpoint_pages)
        except Exception:  # noqa: BLE001  the log keeps everything until it can be copied; commits tell of a bad disk
            ran = True
        if ran:
            self._pages = 0
        return not ran


class JournalWriter:
    """A process's one way to write the journal.

    ``url`` is of SQLite or PostgreSQL; a missing SQLite file or an empty database gets the tables. ``busy_timeout_ms``
    bounds the wait for another process's lock; after about ``checkpoint_pages`` changed pages, or ``idle_s`` seconds
    without work, SQLite's log is copied back.
    """

    def __init__(
        self, url: str, *, busy_timeout_ms: int = 5_000, checkpoint_pages: int = 2_000, idle_s: float = 1.0
    ) -> None:
        self._core = GroupCommit(parse_url(url), busy_timeout_ms=busy_timeout_ms, checkpoint_pages=checkpoint_pages)
        self._worker = Worker("journal writer", self._core.idle, idle_s)

    async def open(self) -> None:
        """Open the database. Raises JournalUnavailable, SchemaMismatch or ConfigurationError; then it is closed."""
        self._worker.start()
        try:
            await self._worker.call(self._core.open)
        except BaseException:
            await self._worker.stop(self._core.close)
            raise

    async def commit(self, units: Sequence[Unit]) -> list[CommitOutcome]:
        """Write ``units`` in one transaction; one outcome for each, in order, once it is durable or refused.

        A unit that is at fault does not keep the others from being written. Cancelling the wait does not undo the
        work. Raises JournalError when the writer is not open or belongs to the process this one was forked from.
        """
        return await self._worker.call(lambda: self._core.commit(units))

    async def find_units(self, ids: Iterable[str], since_seq: int) -> dict[str, Committed]:
        """Which of the units are in the journal after row ``since_seq``. Raises JournalError."""
        wanted = list(ids)
        return await self._worker.call(lambda: self._core.find_units(wanted, since_seq))

    async def keep_lease(self, instance: str, lease_s: float, now_us: Callable[[], int]) -> None:
        """Say that ``instance`` lives for ``lease_s`` seconds of that clock (unix microseconds), and go on saying so.

        It goes on until ``release_lease``, ``close``, or the end of this event loop. Raises JournalError, and tries on.
        """
        lease = Lease(instance, round(lease_s * 1e6), now_us, asyncio.get_running_loop().is_closed)
        await self._worker.call(lambda: self._core.keep_lease(lease))

    async def release_lease(self) -> None:
        """Give the lease back, if there is one: what is unfinished may be taken over at once. Raises JournalError."""
        await self._worker.call(self._core.release_lease)

    async def close(self) -> None:
        """Finish what was given to it and disconnect; closing again does nothing."""
        await self._worker.stop(self._core.close)
