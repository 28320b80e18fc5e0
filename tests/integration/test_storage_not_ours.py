"""What is not this Spine's database, or is none, refuses the start and is left as it is."""

from __future__ import annotations

import pytest

from spine.kernel.errors import JournalUnavailable, SchemaMismatch
from tests.governed import journal, path_of, query, running
from tests.integration.mill import Mill

pytestmark = pytest.mark.anyio


async def test_a_database_of_a_newer_schema_is_left_alone(database_url: str) -> None:
    """SchemaMismatch tells both versions and the remedy; nothing in it is changed."""
    async with running(Mill(database_url).spine):
        pass
    query(database_url, "UPDATE spine_meta SET value = '999' WHERE key = 'schema_version'")
    with pytest.raises(SchemaMismatch, match=r"999.*upgrade hoc-spine"):
        await Mill(database_url).spine.start()
    assert query(database_url, "SELECT value FROM spine_meta") == [("999",)]
    assert journal(database_url) == []


async def test_a_database_with_other_tables_of_the_same_name_is_left_alone(database_url: str) -> None:
    """Somebody's own `runs` is not a journal's."""
    query(database_url, "CREATE TABLE runs (mine TEXT)")
    with pytest.raises(SchemaMismatch, match="runs"):
        await Mill(database_url).spine.start()


@pytest.mark.parametrize("content", [b"this is no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
async def test_a_file_that_is_no_database_is_left_alone(sqlite_url: str, content: bytes) -> None:
    """JournalUnavailable, and the file keeps its bytes."""
    path_of(sqlite_url).write_bytes(content)
    with pytest.raises(JournalUnavailable, match=r"spine\.db"):
        await Mill(sqlite_url).spine.start()
    assert path_of(sqlite_url).read_bytes() == content


async def test_a_directory_in_the_databases_place_is_refused(sqlite_url: str) -> None:
    """JournalUnavailable names it."""
    path_of(sqlite_url).mkdir()
    with pytest.raises(JournalUnavailable, match=r"spine\.db"):
        await Mill(sqlite_url).spine.start()
