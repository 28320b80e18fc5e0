"""Where the journal is kept: database URLs, engines wired for it, and the schema's version."""

from __future__ import annotations

import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, PoolProxiedConnection

from spine.journal.chain import GENESIS, STREAM
from spine.journal.faults import cause
from spine.journal.tables import FIRST_GOVERNANCE, SCHEMA_VERSION, governance, journal_head, metadata, spine_meta
from spine.kernel.errors import ConfigurationError, JournalUnavailable, SchemaMismatch

SQLITE_DRIVERS: Final = ("sqlite", "sqlite+aiosqlite", "sqlite+pysqlite")
POSTGRESQL_DRIVERS: Final = ("postgresql", "postgresql+psycopg")
FIND_META: Final = {
    "sqlite": "SELECT max(name) FROM sqlite_master WHERE type = 'table' AND name = 'spine_meta'",
    "postgresql": "SELECT to_regclass('spine_meta')::text",
}
READ_VERSION: Final = "SELECT value FROM spine_meta WHERE key = 'schema_version'"
_SCHEMA_LOCK: Final = 0x5350494E45  # the word SPINE
_CACHE_KIB: Final = 16_384
_WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed database URL; ``path`` is the absolute file of an SQLite database."""

    dialect: Literal["sqlite", "postgresql"]
    url: URL
    path: Path | None = None

    @property
    def name(self) -> str:
        """What messages call it, without a password."""
        return str(self.path) if self.path is not None else self.url.render_as_string(hide_password=True)

    def file(self) -> Path:
        """The file of an SQLite database."""
        if self.path is None:
            raise ConfigurationError(f"{self.name} is not a file")
        return self.path


def parse_url(url: str) -> Target:
    """Parse a database URL; raise ConfigurationError when a journal cannot be kept there."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigurationError(
            f"{url!r} is not a database URL; write sqlite+aiosqlite:///spine.db or postgresql+psycopg://host/name"
        ) from error
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername in POSTGRESQL_DRIVERS:
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"{shown} needs the driver of PostgreSQL, which is not there ({error}): install hoc-spine[postgres]"
            ) from error
        return Target("postgresql", parsed.set(drivername="postgresql+psycopg"))
    if parsed.drivername not in SQLITE_DRIVERS:
        raise ConfigurationError(
            f"a journal cannot be kept in {shown}: use sqlite+aiosqlite:///FILE or postgresql+psycopg://HOST/NAME"
        )
    database = parsed.database or ""
    if database in {"", ":memory:"} or database.startswith("file:"):
        raise ConfigurationError(
            f"{shown} names no file: a journal in memory would forget what it vouched for; use sqlite+aiosqlite:///FILE"
        )
    if parsed.query:
        raise ConfigurationError(f"{shown}: a journal takes no settings in an SQLite URL; remove what follows the '?'")
    return Target("sqlite", parsed, Path(database).expanduser().absolute())


def writing_engine(target: Target, *, busy_timeout_ms: int, create: bool) -> Engine:
    """An engine for the one writing connection; with ``create=False`` a missing SQLite file is an error."""
    if target.dialect == "postgresql":
        return _postgresql_engine(target, lock_timeout_ms=busy_timeout_ms, read_only=False)
    uri = f"file:{quote(str(target.file()))}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, timeout=busy_timeout_ms / 1000, cached_statements=512
        )
        try:
            _use_wal(connection, busy_timeout_ms)
            for pragma in (
                "synchronous=FULL",
                "foreign_keys=ON",
                "wal_autocheckpoint=0",
                f"journal_size_limit={_WAL_LIMIT_BYTES}",
                f"cache_size=-{_CACHE_KIB}",
            ):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # The driver's own transactions begin too late: at the first write, after what was read.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def reading_engine(target: Target) -> Engine:
    """An engine that cannot write."""
    if target.dialect == "postgresql":
        return _postgresql_engine(target, lock_timeout_ms=5_000, read_only=True)
    uri = read_only_uri(target)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5.0)
        connection.execute("PRAGMA query_only=ON")
        return connection

    return create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)


def raw_connection(engine: Engine, target: Target) -> Any:
    """The driver's own connection, without transactions but those that are begun; who takes it closes it."""
    proxy = engine.raw_connection()
    connection: Any = proxy.driver_connection
    proxy.detach()
    if target.dialect == "postgresql":
        connection.autocommit = True
    return connection


def read_only_uri(target: Target) -> str:
    """The SQLite URI that opens the file for reading only. Raises JournalUnavailable when there is no such file."""
    path = target.file()
    if not path.exists():
        raise JournalUnavailable(f"there is no journal at {path}: check the path, or start a Spine on it first")
    uri = f"file:{quote(str(path))}?mode=ro"
    if not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
        # SQLite cannot make its shared memory there, and nobody writes: evidence on read-only media.
        uri += "&immutable=1"
    return uri


def lenient(stored: bytes) -> str:
    """Text as it is stored: damaged bytes must reach whoever checks the hash."""
    return stored.decode("utf-8", "surrogateescape")


def _use_wal(connection: sqlite3.Connection, busy_timeout_ms: int) -> None:
    """Switch to WAL; the first switch ignores SQLite's own busy timeout, so it is tried again until then."""
    give_up = time.monotonic() + busy_timeout_ms / 1000
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up:
                raise
            time.sleep(0.01)
        else:
            if mode != "wal":
                raise sqlite3.OperationalError(f"only journal mode {mode} is possible there, the journal needs WAL")
            return


def _postgresql_engine(target: Target, *, lock_timeout_ms: int, read_only: bool) -> Engine:
    engine = create_engine(
        target.url, poolclass=NullPool, connect_args={"connect_timeout": 10, "tcp_user_timeout": 20_000}
    )

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: object) -> None:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for setting in postgresql_settings(lock_timeout_ms=lock_timeout_ms, read_only=read_only):
                cursor.execute(setting)
        connection.autocommit = False

    return engine


def postgresql_settings(*, lock_timeout_ms: int, read_only: bool) -> list[str]:
    """What each PostgreSQL session is set to: bounded waits, and commits that have reached the disk."""
    return [
        "SET client_encoding = 'UTF8'",
        f"SET lock_timeout = {lock_timeout_ms}",
        "SET idle_in_transaction_session_timeout = 60000",
        "SET default_transaction_isolation = 'read committed'",
        f"SET default_transaction_read_only = {'on' if read_only else 'off'}",
        # A stricter setting of the server stays; an acknowledged commit is never only in memory.
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
    ]


def prepare_schema(engine: Engine, target: Target) -> None:
    """Create the tables in a database without them, or bring an older SQLite schema up to this version.

    Raises SchemaMismatch for a newer schema, an older one on PostgreSQL, and foreign tables of the same names.
    """
    raw = engine.raw_connection()
    try:
        version = stored_version(raw, target)
    finally:
        raw.close()
    if version == SCHEMA_VERSION:
        return
    with engine.begin() as connection:
        if target.dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _SCHEMA_LOCK})
        version = stored_version(connection.connection, target)
        if version is None:
            _create(connection, target)
        elif version < SCHEMA_VERSION and target.dialect == "sqlite":
            from spine.journal.migrations import upgrade

            upgrade(connection, version)
        else:
            check_version(version, target)


def stored_version(connection: DBAPIConnection | PoolProxiedConnection, target: Target) -> int | None:
    """The schema version a database is stamped with; ``None`` when it holds no journal."""
    cursor = connection.cursor()
    cursor.execute(FIND_META[target.dialect])
    found = cursor.fetchone()
    if found is None or found[0] is None:
        return None
    cursor.execute(READ_VERSION)
    row = cursor.fetchone()
    return None if row is None else int(row[0])


def check_version(version: int | None, target: Target) -> None:
    """Raise SchemaMismatch, saying what to do, unless ``version`` is the one this Spine reads and writes."""
    if version is None:
        raise SchemaMismatch(f"{target.name} holds no journal: check the URL, or start a Spine on it first")
    if version > SCHEMA_VERSION:
        raise SchemaMismatch(
            f"{target.name} has schema version {version}, this Spine knows {SCHEMA_VERSION}: upgrade hoc-spine"
        )
    if version < SCHEMA_VERSION:
        raise SchemaMismatch(
            f"{target.name} has schema version {version}, this Spine needs {SCHEMA_VERSION}: "
            "call spine.journal.migrations.upgrade"
        )


def _create(connection: Connection, target: Target) -> None:
    taken = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
    if taken:
        raise SchemaMismatch(
            f"{target.name} already has tables called {', '.join(taken)} that are not a journal's: "
            "give Spine a database (or a schema) of its own, or rename them"
        )
    metadata.create_all(connection, checkfirst=False)
    stamp(connection)


def stamp(connection: Connection) -> None:
    """Write what a journal holds before its first row: version, empty head, governance active at epoch 1."""
    connection.execute(spine_meta.insert(), {"key": "schema_version", "value": str(SCHEMA_VERSION)})
    connection.execute(journal_head.insert(), {"stream": STREAM, "size": 0, "hash": GENESIS})
    connection.execute(governance.insert(), FIRST_GOVERNANCE)


def unavailable(target: Target, error: BaseException) -> JournalUnavailable:
    """The error to raise when the database itself refuses."""
    return JournalUnavailable(
        f"the journal at {target.name} cannot be used: {str(cause(error)).strip()}; "
        "free or repair the database and try again"
    )
