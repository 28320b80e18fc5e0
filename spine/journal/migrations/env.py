"""What Alembic runs: the revisions, on the connection it was given."""

from __future__ import annotations

from alembic import context

from spine.journal.migrations import VERSION_TABLE
from spine.journal.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=False,
)
context.run_migrations()
