"""Where a journal can be kept, and which schemas are made, refused or upgraded."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from spine.governance.units import Unit
from spine.journal import migrations
from spine.journal.engine import parse_url, writing_engine
from spine.journal.reader import JournalReader
from spine.journal.tables import PROJECTIONS, metadata, spine_meta
from spine.journal.verify import verify
from spine.journal.writer import JournalWriter
from spine.kernel.errors import ConfigurationError, SchemaMismatch
from tests.unit.journal_kit import all_committed, sql, started, write

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("url", "dialect", "path"),
    [
        ("sqlite+aiosqlite:///x.db", "sqlite", "x.db"),
        ("sqlite:///x.db", "sqlite", "x.db"),
        ("sqlite+pysqlite:////var/x y.db", "sqlite", "/var/x y.db"),
        ("postgresql://host/name", "postgresql", None),
        ("postgresql+psycopg://user:secret@host/name?sslmode=require", "postgresql", None),
    ],
)
def test_urls_of_both_databases_are_understood(url: str, dialect: str, path: str | None) -> None:
    target = parse_url(url)
    assert target.dialect == dialect
    assert target.path == (None if path is None else Path(path).absolute())
    assert "secret" not in target.name


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite://", "would forget"),
        ("sqlite:///:memory:", "would forget"),
        ("sqlite+aiosqlite:///:memory:", "would forget"),
        ("sqlite:///file:x?mode=memory&uri=true", "would forget"),
        ("sqlite:///x.db?timeout=3", "remove what follows"),
        ("mysql://user:secret@host/name", "postgresql"),
        ("postgresql+asyncpg://host/name", "psycopg"),
        ("no url", "not a database URL"),
        ("", "not a database URL"),
    ],
)
def test_urls_that_cannot_hold_a_journal_are_refused_with_the_remedy(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as raised:
        parse_url(url)
    assert "secret" not in str(raised.value)


def test_a_postgresql_url_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql://user:secret@host/name"
    for use in (parse_url, JournalWriter, JournalReader, verify):
        with pytest.raises(ConfigurationError, match=r"install hoc-spine\[postgres\]") as raised:
            use(url)
        assert "secret" not in str(raised.value)


def test_a_relative_path_stays_where_it_was_when_the_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = parse_url("sqlite:///x.db")
    monkeypatch.chdir("/")
    assert target.path == tmp_path / "x.db"


def test_odd_file_names_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a b?c#d%20é.db"
    url = f"sqlite:///{str(path).replace('?', '%3F')}"
    target = parse_url(url)
    assert all_committed(asyncio.run(write(url, [Unit("u", [started()])])))
    assert target.file().exists()
    assert verify(url).rows == 1


def test_sqlite_is_opened_durable_and_with_foreign_keys(sqlite_url: str) -> None:
    async def settings() -> dict[str, Any]:
        writer = JournalWriter(sqlite_url, busy_timeout_ms=1_234)
        await writer.open()
        connection = writer._core._session._connection
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "wal_autocheckpoint", "mmap_size")
        found = await writer._worker.call(
            lambda: {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names}
        )
        await writer.close()
        return found

    assert asyncio.run(settings()) == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 1_234,
        "wal_autocheckpoint": 0,
        "mmap_size": 0,
    }


def test_postgresql_commits_reach_the_disk_whatever_the_server_defaults_to(journal_postgresql_url: str) -> None:
    async def settings(url: str) -> tuple[Any, ...]:
        writer = JournalWriter(url, busy_timeout_ms=1_234)
        await writer.open()
        connection = writer._core._session._connection
        names = ("synchronous_commit", "transaction_isolation", "lock_timeout")
        found = await writer._worker.call(
            lambda: tuple(connection.execute(f"SHOW {name}").fetchone()[0] for name in names)
        )
        await writer.close()
        return found

    expected = ("on", "read committed", "1234ms")
    assert asyncio.run(settings(journal_postgresql_url)) == expected
    weak = journal_postgresql_url + "%20-csynchronous_commit%3Doff%20-cdefault_transaction_isolation%3Dserializable"
    assert asyncio.run(settings(weak)) == expected


def test_a_new_journal_is_made_by_the_first_of_many(journal_url: str) -> None:
    async def many() -> list[Any]:
        return await asyncio.gather(*(write(journal_url, [Unit(f"u{n}", [started(f"r{n}")])]) for n in range(4)))

    assert all(all_committed(outcomes) for outcomes in asyncio.run(many()))
    assert verify(journal_url).rows == 4


def test_a_journal_lives_beside_an_applications_own_tables(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE customers (id INTEGER)")
    assert all_committed(asyncio.run(write(journal_url, [Unit("u", [started()])])))
    assert verify(journal_url).ok


def test_foreign_tables_of_the_same_names_are_left_alone(journal_url: str) -> None:
    sql(journal_url, "CREATE TABLE runs (id INTEGER)")
    with pytest.raises(SchemaMismatch, match="tables called runs"):
        asyncio.run(write(journal_url, []))
    assert sql(journal_url, "SELECT count(*) FROM runs") == [(0,)]
    with pytest.raises(SchemaMismatch, match="holds no journal"):
        verify(journal_url)


def test_a_newer_schema_is_refused_and_left_alone(journal_url: str) -> None:
    asyncio.run(write(journal_url, [Unit("u", [started()])]))
    sql(journal_url, "UPDATE spine_meta SET value = '2'")
    with pytest.raises(SchemaMismatch, match="schema version 2, this Spine knows 1: upgrade hoc-spine"):
        asyncio.run(write(journal_url, [Unit("u2", [started("b")])]))
    assert sql(journal_url, "SELECT count(*) FROM journal") == [(1,)]


def test_an_older_schema_is_upgraded_on_sqlite_and_refused_on_postgresql(
    journal_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(write(journal_url, []))
    sql(journal_url, "UPDATE spine_meta SET value = '0'")
    if "postgresql" in journal_url:
        with pytest.raises(SchemaMismatch, match=r"journal\.migrations\.upgrade"):
            asyncio.run(write(journal_url, []))
        return
    upgraded: list[int] = []

    def upgrade(connection: Any, version: int) -> None:
        upgraded.append(version)
        connection.execute(spine_meta.update().values(value="1"))

    monkeypatch.setattr(migrations, "upgrade", upgrade)
    assert all_committed(asyncio.run(write(journal_url, [Unit("u", [started()])])))
    assert upgraded == [0]


def test_the_revisions_lead_to_the_schema_that_a_new_database_gets(journal_url: str) -> None:
    target = parse_url(journal_url)
    engine = writing_engine(target, busy_timeout_ms=5_000, create=True)
    with engine.begin() as connection:
        migrations.upgrade(connection, 0)
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
        assert differences == []
        assert set(inspect(connection).get_table_names()) == set(metadata.tables)
        upgraded = _shape(connection)
        metadata.drop_all(connection)
        metadata.create_all(connection)
        assert _shape(connection) == upgraded
    engine.dispose()


def _shape(connection: Any) -> Any:
    """Everything the database itself says about the schema."""
    if connection.dialect.name == "sqlite":
        found = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
        return {name: " ".join(text.split()) for name, text in found}
    columns = connection.exec_driver_sql(
        "SELECT table_name, column_name, data_type, is_nullable, collation_name, column_default "
        "FROM information_schema.columns WHERE table_schema = current_schema() ORDER BY 1, 2"
    ).all()
    indexes = connection.exec_driver_sql(
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema() ORDER BY 1"
    ).all()
    return columns, indexes


def test_the_last_revision_is_the_schema_version() -> None:
    from alembic.script import ScriptDirectory

    folder = Path(migrations.__file__).parent
    assert ScriptDirectory(folder).get_current_head() == migrations.revision(1)
    assert migrations.revision(0) == "base"


def test_every_projection_has_a_primary_key_in_text_or_numbers() -> None:
    assert all(table.primary_key.columns for table in PROJECTIONS)


def test_importing_spine_or_the_pure_parts_does_not_import_a_database_library() -> None:
    code = (
        "import sys, spine, spine.governance.units\n"
        "import spine.journal.projections, spine.journal.rows, spine.journal.chain\n"
        "print(sorted({'sqlalchemy', 'aiosqlite', 'alembic', 'psycopg', 'sqlite3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"


def test_opening_a_current_schema_does_not_import_alembic(sqlite_url: str) -> None:
    code = (
        "import asyncio, sys\n"
        "from spine.journal.writer import JournalWriter\n"
        "async def main():\n"
        "    writer = JournalWriter(sys.argv[1]); await writer.open(); await writer.close()\n"
        "asyncio.run(main())\n"
        "print('alembic' in sys.modules, 'psycopg' in sys.modules, 'sqlalchemy.ext.asyncio' in sys.modules)"
    )
    command = [sys.executable, "-c", code, sqlite_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
