"""A Spine that is given no publisher writes its events to the log."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from spine import Spine
from tests.governed import journal, running
from tests.participants import complete

pytestmark = pytest.mark.anyio


async def test_the_default_publisher_logs_each_event(sqlite_url: str) -> None:
    """With the ids by which it is found in the journal, and what it is."""
    with capture_logs() as logs:
        async with running(spine := Spine(sqlite_url)):
            done = await complete(spine)
            assert done.phase == "EVENTS_PUBLISHED"
    (event,) = journal(sqlite_url, "event")
    assert [line for line in logs if line["event"] == "spine.event"] == [
        {
            "event": "spine.event",
            "log_level": "info",
            "event_id": event["event_id"],
            "type": "run.completed",
            "run_id": "run-1",
            "tenant_id": "acme",
            "tx_id": done.transaction_id,
        }
    ]
