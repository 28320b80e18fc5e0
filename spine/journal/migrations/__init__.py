"""Schema upgrades with Alembic, imported only for a database of an older version.

The version that counts is the one in ``spine_meta``; Alembic's own table only serves it while an upgrade runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from spine.journal.tables import SCHEMA_VERSION

VERSION_TABLE: Final = "spine_schema_revision"


def configuration(connection: Connection) -> Config:
    """Alembic's configuration for one open connection; nothing is read from a file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def revision(version: int) -> str:
    """The revision that leads to a schema version; ``base`` for 0."""
    return f"{version:04d}" if version else "base"


def upgrade(connection: Connection, version: int) -> None:
    """Bring a schema of an older ``version`` up to this one, in the connection's transaction."""
    config = configuration(connection)
    if version:
        command.stamp(config, revision(version))
    command.upgrade(config, revision(SCHEMA_VERSION))
    connection.execute(
        text("UPDATE spine_meta SET value = :version WHERE key = 'schema_version'"), {"version": str(SCHEMA_VERSION)}
    )
    connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))
