"""An application whose EXTERNAL payment domain fails for the runs it is told; what is paid outlives the process."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from spine import Spine
from spine.effects import Effect
from spine.settings import Retry, Settings


def ledger() -> sqlite3.Connection:
    connection = sqlite3.connect(os.environ["PAYDAY_LEDGER"], isolation_level=None, timeout=10)
    connection.execute("CREATE TABLE IF NOT EXISTS paid (effect TEXT PRIMARY KEY, run TEXT, live INTEGER)")
    return connection


class Payments:
    name = "payments"
    after = ("policies",)
    timeout_s = 10.0
    attempts = 2

    def __init__(self) -> None:
        self.failing = frozenset(json.loads(Path(os.environ["PAYDAY_FAILS"]).read_text(encoding="utf-8")))

    async def forward(self, effect: Effect) -> Mapping[str, Any]:
        if effect.run_id in self.failing:
            raise ConnectionError(f"the card network does not answer for {effect.run_id}")
        with closing(ledger()) as db:
            db.execute("INSERT INTO paid VALUES (?, ?, 1) ON CONFLICT DO NOTHING", (effect.id, effect.run_id))
            (live,) = db.execute("SELECT live FROM paid WHERE effect = ?", (effect.id,)).fetchone()
        if not live:
            raise ConnectionError(f"{effect.id} was taken back before")
        return {"id": f"payment-{effect.run_id}"}

    async def rollback(self, effect: Effect) -> None:
        if "PAYDAY_STUCK" in os.environ:
            raise ConnectionError("the card network is gone")
        with closing(ledger()) as db:
            db.execute(
                "INSERT INTO paid VALUES (?, ?, 0) ON CONFLICT (effect) DO UPDATE SET live = 0",
                (effect.id, effect.run_id),
            )


def spine() -> Spine:
    return Spine(domains=[Payments()], settings=Settings(retry=Retry(3, 0.001, 0.01)))
