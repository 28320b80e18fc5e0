"""Reading the journal beside its writer: lookups by id, lists, and whether the rows behind an answer are intact."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from typing import Any, Final
from urllib.parse import parse_qsl

import anyio
import orjson
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from spine.governance.contract import CONTRACT_KINDS
from spine.journal.chain import GENESIS, MAIN_PREFIX, STREAM, row_hash
from spine.journal.engine import (
    FIND_META,
    READ_VERSION,
    Target,
    check_version,
    parse_url,
    postgresql_settings,
    read_only_uri,
    unavailable,
)
from spine.journal.processes import closed, opened, surely_dead
from spine.journal.rows import (
    Counts,
    DueContract,
    GovernanceRow,
    HeadRow,
    IdempotencyRow,
    OpenDecision,
    Row,
    RunRow,
    TransactionRow,
)
from spine.kernel.errors import JournalBroken

_NO_LINK: Final = (b"", b"")
_LAST_CHARACTER: Final = "\U0010ffff"
_IDS: Final = 400
_CLOSE_S: Final = 2.0
_READ_S: Final = 10.0
_PAGE: Final = 500
_MAIN: Final = f"stream = '{STREAM}'"
_ROW: Final = "seq, prev, hash, body"


def _columns(shape: type) -> str:
    return ", ".join(field.name for field in fields(shape))


class JournalReader:
    """Reads one database through connections that cannot write; every method may raise JournalError."""

    def __init__(self, url: str) -> None:
        self._target = parse_url(url)
        self._engine: AsyncEngine | None = None
        self._opening = asyncio.Lock()
        self._reading: set[asyncio.Task[list[Any]]] = set()
        self._placeholder = "?" if self._target.dialect == "sqlite" else "%s"

    async def open(self) -> None:
        """Connect and check the schema's version; reading does it when it was not done before.

        Raises JournalUnavailable, and SchemaMismatch when the database holds no journal or another version of it.
        """
        await self._open()

    async def _open(self) -> AsyncEngine:
        async with self._opening:
            if self._engine is None:
                if self._target.path is not None:
                    opened(self._target.path)
                try:
                    self._engine = await self._connect()
                except BaseException:
                    self._closed()
                    raise
            return self._engine

    def _closed(self) -> None:
        if self._target.path is not None:
            closed(self._target.path)

    async def _connect(self) -> AsyncEngine:
        engine = _engine(self._target)
        try:
            async with engine.connect() as connection:
                found = (await connection.exec_driver_sql(FIND_META[self._target.dialect])).scalar()
                stored = (await connection.exec_driver_sql(READ_VERSION)).scalar() if found is not None else None
            check_version(None if stored is None else int(stored), self._target)
        except SQLAlchemyError as error:
            await engine.dispose()
            raise unavailable(self._target, error) from error
        except BaseException:
            await engine.dispose()
            raise
        return engine

    async def close(self) -> None:
        """Close its connections; reading again opens new ones."""
        if self._reading:
            # What is still being opened has no engine to dispose of yet, and a pool forgets what is out when it goes.
            await asyncio.wait(list(self._reading), timeout=_CLOSE_S)
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.dispose()
            self._closed()

    async def head(self) -> HeadRow:
        """Where the chain ends."""
        found = await self._all(f"SELECT size, hash FROM journal_head WHERE {_MAIN}")
        if not found:
            raise JournalBroken(f"the journal at {self._target.name} has lost its head: run `spine verify`")
        return HeadRow(found[0][0], bytes(found[0][1]))

    async def governance(self) -> GovernanceRow:
        """The governance state as last committed, by whatever process."""
        found = await self._all(f"SELECT {_columns(GovernanceRow)} FROM governance WHERE id = 1")
        if not found:
            raise JournalBroken(f"the journal at {self._target.name} has lost its governance row: run `spine verify`")
        return GovernanceRow(*found[0])

    async def run(self, run_id: str) -> RunRow | None:
        """The run, if it was started."""
        found = await self._all(f"SELECT {_columns(RunRow)} FROM runs WHERE run_id = ?", run_id)
        return _run(found[0]) if found else None

    async def run_rows(self, run_id: str) -> list[Row]:
        """Every journal row of the run, in order."""
        found = await self._all(f"SELECT {_ROW} FROM journal WHERE run_id = ? AND {_MAIN} ORDER BY seq", run_id)
        return [_row(values) for values in found]

    async def contract_rows(self, run_id: str) -> list[Row]:
        """The journal rows of the run that tell of its contract, in order."""
        marks = ", ".join("?" * len(CONTRACT_KINDS))
        found = await self._all(
            f"SELECT {_ROW} FROM journal WHERE run_id = ? AND {_MAIN} AND kind IN ({marks}) ORDER BY seq",
            run_id,
            *CONTRACT_KINDS,
        )
        return [_row(values) for values in found]

    async def due_contracts(
        self, before_us: int, limit: int, *, after: tuple[int, str] | None = None
    ) -> list[DueContract]:
        """Up to ``limit`` contracts due before that time (unix microseconds), the earliest first.

        ``after`` is the moment and run id to go on from.
        """
        where: list[str] = ["due_at < ?"]
        values: list[Any] = [before_us]
        if after is not None:
            where.append("(due_at, run_id) > (?, ?)")
            values += after
        found = await self._all(
            f"SELECT {_columns(DueContract)} FROM contracts WHERE {' AND '.join(where)} "
            "ORDER BY due_at, run_id LIMIT ?",
            *values,
            limit,
        )
        return [DueContract(*values) for values in found]

    async def run_ids_like(self, prefix: str, limit: int = 10) -> list[str]:
        """Up to ``limit`` ids, sorted, of runs with journal rows that begin with ``prefix``."""
        found = await self._all(
            "SELECT DISTINCT run_id FROM journal WHERE run_id >= ? AND run_id < ? ORDER BY run_id LIMIT ?",
            prefix,
            prefix + _LAST_CHARACTER,
            limit,
        )
        return [values[0] for values in found]

    async def runs(self, limit: int = 50, *, before: int | None = None, state: str | None = None) -> list[RunRow]:
        """Up to ``limit`` runs, last started first; ``before`` is the ``started_seq`` to go on from."""
        where: list[str] = ["1 = 1"]
        values: list[Any] = []
        if before is not None:
            where.append("started_seq < ?")
            values.append(before)
        if state is not None:
            where.append("state = ?")
            values.append(state)
        found = await self._all(
            f"SELECT {_columns(RunRow)} FROM runs WHERE {' AND '.join(where)} ORDER BY started_seq DESC LIMIT ?",
            *values,
            limit,
        )
        return [_run(values) for values in found]

    async def idempotency(self, tenant_id: str, operation: str, key: str) -> IdempotencyRow | None:
        """What the key was claimed for, if it was."""
        found = await self._all(
            f"SELECT {_columns(IdempotencyRow)} FROM idempotency WHERE tenant_id = ? AND operation = ? AND key = ?",
            tenant_id,
            operation,
            key,
        )
        return IdempotencyRow(*found[0]) if found else None

    async def body_at(self, seq: int) -> dict[str, Any]:
        """The body of one row. Raises JournalBroken when there is no such row or it is not a JSON object."""
        found = await self._all(f"SELECT {_ROW} FROM journal WHERE {_MAIN} AND seq = ?", seq)
        body = _row(found[0]).body if found else {}
        if not body:
            raise JournalBroken(f"journal row {seq} of {self._target.name} is missing or damaged: run `spine verify`")
        return body

    async def open_decisions(self, instances_dead_before_us: int) -> list[OpenDecision]:
        """Decisions without an outcome whose process is dead, oldest first.

        Dead is who held no lease at that time (unix microseconds), or ran on this machine and surely runs no more.
        """
        owners = await self._all(
            "SELECT d.instance, i.lease_until_at, i.process FROM (SELECT DISTINCT instance FROM open_decisions) d "
            "LEFT JOIN instances i ON i.instance = d.instance"
        )
        dead = [
            instance
            for instance, until, process in owners
            if until is None or until < instances_dead_before_us or surely_dead(process)
        ]
        columns = ", ".join(field.name for field in fields(OpenDecision))
        found: list[OpenDecision] = []
        for instance in dead:
            rows = await self._all(f"SELECT {columns} FROM open_decisions WHERE instance = ?", instance)
            found += [OpenDecision(*values) for values in rows]
        return sorted(found, key=lambda decision: decision.seq)

    async def living(self, now_us: int) -> set[str]:
        """The instances that hold a lease at that time (unix microseconds) and are not surely dead."""
        held = await self._all("SELECT instance, process FROM instances WHERE lease_until_at >= ?", now_us)
        return {instance for instance, process in held if not surely_dead(process)}

    async def pending_events(self, limit: int = 100) -> list[dict[str, Any]]:
        """The bodies of up to ``limit`` events that wait to be published, in journal order."""
        found = await self._all(
            f"SELECT {', '.join('j.' + name for name in _ROW.split(', '))} FROM outbox o "
            f"JOIN journal j ON j.{_MAIN} AND j.seq = o.seq WHERE o.state = 'pending' ORDER BY o.seq LIMIT ?",
            limit,
        )
        return [_row(values).body for values in found]

    async def transaction(self, run_id: str, completion_key: str) -> TransactionRow | None:
        """The latest attempt to complete the run under the key, if there was one."""
        found = await self._all(
            f"SELECT {_columns(TransactionRow)} FROM transactions WHERE run_id = ? AND completion_key = ? "
            "ORDER BY attempt DESC LIMIT 1",
            run_id,
            completion_key,
        )
        return TransactionRow(*found[0]) if found else None

    async def bypassed_denials(self, epoch: int, limit: int = 100) -> tuple[int, list[dict[str, Any]]]:
        """How many decisions of a bypass would have been denials, and the bodies of the first ``limit``."""
        count, after = 0, await self._epoch_began(epoch)
        bodies: list[dict[str, Any]] = []
        while True:
            page = await self._all(
                f"SELECT {_ROW} FROM journal WHERE {_MAIN} AND seq > ? AND kind IN ('decision', 'governance.changed') "
                "AND (kind <> 'decision' OR body LIKE ?) ORDER BY seq LIMIT ?",
                after,
                '%"effect":"bypassed"%',
                _PAGE,
            )
            for row in map(_row, page):
                if row.body.get("kind") == "governance.changed":
                    return count, bodies
                if row.body.get("epoch") == epoch and row.body.get("would_have") is not None:
                    count += 1
                    if len(bodies) < limit:
                        bodies.append(row.body)
                after = row.seq
            if len(page) < _PAGE:
                return count, bodies

    async def _epoch_began(self, epoch: int) -> int:
        """The row that began the epoch; 0 for the first."""
        found = await self._all(
            f"SELECT {_ROW} FROM journal WHERE {_MAIN} AND kind = 'governance.changed' ORDER BY seq DESC"
        )
        return next((row.seq for row in map(_row, found) if row.body.get("epoch") == epoch), 0)

    async def run_evidence(self, rows: Sequence[Row]) -> bool:
        """Whether each row's hash is right, binds its predecessor, and is bound by its successor or the head."""
        if any(row_hash(MAIN_PREFIX, row.seq, row.prev, _stored(row.raw)) != row.hash for row in rows):
            return False
        links = await self._links({seq for row in rows for seq in (row.seq - 1, row.seq + 1) if seq > 0})
        head = await self.head()
        # Rows may have been appended between the two looks.
        links |= await self._links({row.seq + 1 for row in rows if row.seq < head.size} - links.keys())
        for row in rows:
            before = GENESIS if row.seq == 1 else links.get(row.seq - 1, _NO_LINK)[1]
            after = head.hash if row.seq == head.size else links.get(row.seq + 1, _NO_LINK)[0]
            if row.prev != before or row.hash != after:
                return False
        return True

    async def _links(self, seqs: AbstractSet[int]) -> dict[int, tuple[bytes, bytes]]:
        """``prev`` and ``hash`` of the rows that exist."""
        found, wanted = {}, sorted(seqs)
        for at in range(0, len(wanted), _IDS):
            some = wanted[at : at + _IDS]
            marks = ",".join("?" * len(some))
            sql = f"SELECT seq, prev, hash FROM journal WHERE {_MAIN} AND seq IN ({marks})"
            found.update({seq: (_bytes(prev), _bytes(digest)) for seq, prev, digest in await self._all(sql, *some)})
        return found

    async def tail(self, after_seq: int, limit: int = 100) -> list[Row]:
        """Up to ``limit`` rows behind ``after_seq``, in order."""
        found = await self._all(
            f"SELECT {_ROW} FROM journal WHERE {_MAIN} AND seq > ? ORDER BY seq LIMIT ?", after_seq, limit
        )
        return [_row(values) for values in found]

    async def counts(self) -> Counts:
        """How much there is of what."""
        states = dict(await self._pairs("SELECT state, count(*) FROM runs GROUP BY state"))
        contracts = dict(await self._pairs("SELECT overall, count(*) FROM contracts GROUP BY overall"))
        events = dict(await self._pairs("SELECT state, count(*) FROM outbox GROUP BY state"))
        ((decisions, transactions),) = await self._all(
            "SELECT (SELECT count(*) FROM open_decisions), (SELECT count(*) FROM transactions)"
        )
        return Counts(
            rows=(await self.head()).size,
            runs=sum(states.values()),
            runs_open=states.get("open", 0),
            runs_committed=states.get("committed", 0),
            runs_aborted=states.get("aborted", 0),
            runs_parked=states.get("parked", 0),
            decisions_open=decisions,
            transactions=transactions,
            events=sum(events.values()),
            events_pending=events.get("pending", 0),
            contracts_pending=contracts.get("PENDING", 0),
            contracts_complete=contracts.get("COMPLETE", 0),
            contracts_incomplete=contracts.get("INCOMPLETE", 0),
            contracts_stale=contracts.get("STALE", 0),
        )

    async def _pairs(self, sql: str) -> list[tuple[str, int]]:
        return [(values[0], values[1]) for values in await self._all(sql)]

    async def _all(self, sql: str, *params: Any) -> list[Any]:
        # In a task of its own: a caller that is cancelled in the middle of a query must leave no connection behind,
        # whose thread would answer a loop that may be closed by then.
        reading = asyncio.create_task(self._twice(sql, params), name="spine.journal.read")
        self._reading.add(reading)
        reading.add_done_callback(self._read_ended)
        return await asyncio.shield(reading)

    def _read_ended(self, reading: asyncio.Task[list[Any]]) -> None:
        self._reading.discard(reading)
        if not reading.cancelled():
            # Seen, even when its caller is gone.
            reading.exception()

    async def _twice(self, sql: str, params: tuple[Any, ...]) -> list[Any]:
        try:
            return await self._read(sql, params)
        except SQLAlchemyError as error:
            if not (isinstance(error, DBAPIError) and error.connection_invalidated):
                raise unavailable(self._target, error) from error
        # The server dropped a connection that lay in the pool: reading again does no harm.
        try:
            return await self._read(sql, params)
        except SQLAlchemyError as error:
            raise unavailable(self._target, error) from error

    async def _read(self, sql: str, params: tuple[Any, ...]) -> list[Any]:
        engine = self._engine or await self._open()
        try:
            with anyio.fail_after(_READ_S):
                async with engine.connect() as connection:
                    result = await connection.exec_driver_sql(sql.replace("?", self._placeholder), params or None)
                    return list(result.all())
        except TimeoutError as error:
            raise unavailable(self._target, error) from error


def _engine(target: Target) -> AsyncEngine:
    if target.dialect == "postgresql":
        engine = create_async_engine(target.url, isolation_level="AUTOCOMMIT", pool_size=4, max_overflow=0)
        settings = postgresql_settings(lock_timeout_ms=5_000, read_only=True)
    else:
        uri, _, query = read_only_uri(target).partition("?")
        url = URL.create("sqlite+aiosqlite", database=uri, query={**dict(parse_qsl(query)), "uri": "true"})
        engine = create_async_engine(url, pool_size=4, max_overflow=0)
        settings = ["PRAGMA query_only=ON"]

    @event.listens_for(engine.sync_engine, "connect")
    def _settings(connection: Any, _record: object) -> None:
        if target.dialect == "sqlite":
            connection.driver_connection.text_factory = _lenient
        cursor = connection.cursor()
        for setting in settings:
            cursor.execute(setting)
        cursor.close()

    return engine


def _lenient(stored: bytes) -> str:
    """Text as it is stored: damaged bytes must reach whoever checks the hash."""
    return stored.decode("utf-8", "surrogateescape")


def _stored(raw: str) -> bytes:
    return raw.encode("utf-8", "surrogateescape")


def _bytes(value: Any) -> bytes:
    return bytes(value) if isinstance(value, (bytes, memoryview)) else b""


def _row(values: Sequence[Any]) -> Row:
    seq, prev, digest, raw = values
    if not isinstance(raw, str):
        raw = _lenient(_bytes(raw))
    try:
        body = orjson.loads(raw)
    except ValueError:
        body = {}
    return Row(seq, _bytes(prev), _bytes(digest), body if isinstance(body, dict) else {}, raw)


def _run(values: Sequence[Any]) -> RunRow:
    run = RunRow(*values)
    return run if isinstance(run.implicit, bool) else replace(run, implicit=bool(run.implicit))
