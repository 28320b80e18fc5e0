"""The databases of this library's sides: a new SQLite file or a new PostgreSQL database for each measurement."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POSTGRESQL_URL = os.environ.get("SPINE_TEST_POSTGRESQL_URL", "postgresql+psycopg://root@127.0.0.1:5432/test")


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a new database: a file in the folder, or a PostgreSQL database dropped afterwards."""
    if kind != "postgresql":
        yield f"sqlite+aiosqlite:///{folder / 'spine.db'}"
        return
    import psycopg

    name = f"spine_bench_{uuid.uuid4().hex}"
    with psycopg.connect(POSTGRESQL_URL.replace("+psycopg", ""), autocommit=True) as server:
        server.execute(f'CREATE DATABASE "{name}"')
        try:
            yield f"{POSTGRESQL_URL.rpartition('/')[0]}/{name}"
        finally:
            server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def postgresql_reachable() -> bool:
    """Whether a PostgreSQL server answers at SPINE_TEST_POSTGRESQL_URL."""
    if importlib.util.find_spec("psycopg") is None:
        return False
    import psycopg

    try:
        psycopg.connect(POSTGRESQL_URL.replace("+psycopg", ""), connect_timeout=3).close()
    except psycopg.OperationalError:
        return False
    return True
