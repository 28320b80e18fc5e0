"""What a journal holds, without what differs between two journals of the same story."""

from __future__ import annotations

import json
import re
from typing import Any

from spine.journal.reader import JournalReader

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
TIMES = frozenset(
    {
        "at",
        "deadline_at",
        "due_at",
        "completed_at",
        "created_at",
        "timestamp",
        "duration_ms",
        "queue_us",
        "eval_us",
        "handle_us",
    }
)


async def bodies(url: str) -> list[dict[str, Any]]:
    """Every record of the journal in order."""
    reader = JournalReader(url)
    await reader.open()
    try:
        return [row.body for row in await reader.tail(0, 100_000)]
    finally:
        await reader.close()


def alike(value: Any) -> Any:
    """``value`` with times blanked and ids numbered by their first appearance."""
    seen: dict[str, str] = {}

    def numbered(match: re.Match[str]) -> str:
        return seen.setdefault(match[0], f"id-{len(seen) + 1}")

    def blank(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: "time" if key in TIMES else blank(item) for key, item in node.items()}
        return [blank(item) for item in node] if isinstance(node, list) else node

    return json.loads(UUID.sub(numbered, json.dumps(blank(value), sort_keys=True, default=str)))
