"""Journals for tests of the journal itself: a file of their own, or a schema of their own in one database."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def journal_database(postgresql_server: str) -> Iterator[str]:
    """One PostgreSQL database for all tests of a session; a database for each would cost more than the tests."""
    import psycopg

    base, name = postgresql_server.rpartition("/")[0], f"spine_journal_{uuid.uuid4().hex}"
    with psycopg.connect(postgresql_server.replace("+psycopg", ""), autocommit=True) as server:
        server.execute(f'CREATE DATABASE "{name}"')
        try:
            yield f"{base}/{name}"
        finally:
            server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def journal_postgresql_url(journal_database: str) -> Iterator[str]:
    """A new, empty schema, dropped afterwards."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(journal_database.replace("+psycopg", ""), autocommit=True) as server:
        server.execute(f'CREATE SCHEMA "{name}"')
        try:
            yield f"{journal_database}?options=-csearch_path%3D{name}"
        finally:
            server.execute("SET client_min_messages = error")
            server.execute(f'DROP SCHEMA "{name}" CASCADE')


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def journal_url(request: pytest.FixtureRequest) -> str:
    """A place for a new journal of each kind: a test that asks for it runs on both."""
    fixture = "sqlite_url" if request.param == "sqlite" else "journal_postgresql_url"
    url: str = request.getfixturevalue(fixture)
    return url
