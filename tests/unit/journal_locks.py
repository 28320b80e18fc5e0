"""Another connection that keeps a journal's writer out."""

from __future__ import annotations

import sqlite3
from typing import Any


class Locked:
    """Holds what a batch must lock."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        self._connection: Any
        if "sqlite" in self._url:
            self._connection = sqlite3.connect(self._url.partition("///")[2], isolation_level=None)
            self._connection.execute("BEGIN IMMEDIATE")
        else:
            import psycopg

            self._connection = psycopg.connect(self._url.replace("+psycopg", ""))
            self._connection.execute("SELECT 1 FROM journal_head FOR UPDATE")

    def __exit__(self, *_: object) -> None:
        self._connection.rollback() if "postgresql" in self._url else self._connection.execute("ROLLBACK")
        self._connection.close()
