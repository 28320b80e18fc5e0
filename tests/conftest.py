"""What every test may ask for: the event loop of the library, and fresh databases of both kinds."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import spine

PACKAGES = Path(next(iter(spine.__path__))).parent
POSTGRESQL_URL = os.environ.get("SPINE_TEST_POSTGRESQL_URL", "postgresql+psycopg://root@127.0.0.1:5432/test")
REQUIRED = frozenset(filter(None, os.environ.get("SPINE_TEST_REQUIRE", "").replace(",", " ").split()))


def pytest_configure() -> None:
    """Ctrl-C reaches the subprocesses under test even when the tests were started in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test neither finds nor leaves a spine.db, and does not see the developer's settings.

    Its subprocesses find the packages under test from any directory.
    """
    for name in [name for name in os.environ if name.startswith("SPINE_") and not name.startswith("SPINE_TEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A new SQLite database; the file does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'spine.db'}"


@pytest.fixture(scope="session")
def postgresql_server() -> str:
    """The server's URL, or a skip that says so; a failure when SPINE_TEST_REQUIRE names postgresql."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    try:
        psycopg.connect(POSTGRESQL_URL.replace("+psycopg", ""), connect_timeout=3).close()
    except psycopg.OperationalError as error:
        message = f"no PostgreSQL at SPINE_TEST_POSTGRESQL_URL ({POSTGRESQL_URL}): {str(error).strip()}"
        if "postgresql" in REQUIRED:
            pytest.fail(message)
        pytest.skip(message)
    return POSTGRESQL_URL


@pytest.fixture
def postgresql_url(postgresql_server: str) -> Iterator[str]:
    """A new, empty PostgreSQL database, dropped afterwards whoever is still connected."""
    import psycopg

    base = postgresql_server.rpartition("/")[0]
    name = f"spine_test_{uuid.uuid4().hex}"
    with psycopg.connect(postgresql_server.replace("+psycopg", ""), autocommit=True) as server:
        server.execute(f'CREATE DATABASE "{name}"')
        try:
            yield f"{base}/{name}"
        finally:
            server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database_url(request: pytest.FixtureRequest) -> str:
    """A new database of each kind: a test that asks for it runs on both."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
