"""A small payment service with a bad day: ``python payments_service.py --db FILE``; standard library only.

It charges accounts over HTTP, keeps what it did in a SQLite file that survives its being killed, and on demand loses
replies, dawdles and refuses. A charge is named by the id that its client gives it: named again it is the same charge,
and once taken back it never comes again.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TABLE = """CREATE TABLE IF NOT EXISTS charges (
    id TEXT PRIMARY KEY,
    receipt INTEGER,
    account TEXT,
    cents INTEGER,
    state TEXT NOT NULL CHECK (state IN ('applied', 'tombstoned')),
    late INTEGER NOT NULL DEFAULT 0
)"""


class Refusal(Exception):
    """The service says no, with an HTTP status; a tombstone is no business matter, an account without money is."""

    def __init__(self, http: int, code: str, reason: str) -> None:
        super().__init__(reason)
        self.http = http
        self.told = {"code": code, "reason": reason}


class Charges:
    """What was charged, durable before it is told; ``late`` counts charges that came after they were taken back."""

    def __init__(self, path: str, closed: frozenset[str] = frozenset()) -> None:
        self._path = path
        self._closed = closed
        with closing(self._open()) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(TABLE)

    def charge(self, key: str, account: str, cents: int) -> dict[str, Any]:
        """Charge the account, once whatever happens; the receipt is the same each time."""
        with closing(self._open()) as db, db:
            db.execute("BEGIN IMMEDIATE")
            known = db.execute("SELECT state, receipt, cents FROM charges WHERE id = ?", (key,)).fetchone()
            if known is None and account in self._closed:
                raise Refusal(402, "ACCOUNT_CLOSED", f"account {account} is closed")
            if known is None:
                (receipt,) = db.execute("SELECT COALESCE(MAX(receipt), 0) + 1 FROM charges").fetchone()
                row = (key, receipt, account, cents)
                db.execute(
                    "INSERT INTO charges (id, receipt, account, cents, state) VALUES (?, ?, ?, ?, 'applied')", row
                )
                return {"id": f"receipt-{receipt}", "cents": cents}
            if known[0] == "applied":
                return {"id": f"receipt-{known[1]}", "cents": known[2]}
            db.execute("UPDATE charges SET late = late + 1 WHERE id = ?", (key,))
        raise Refusal(410, "TAKEN_BACK", f"charge {key} was taken back")

    def take_back(self, key: str) -> None:
        """Undo the charge, or see to it that it never happens."""
        with closing(self._open()) as db, db:
            db.execute("BEGIN IMMEDIATE")
            db.execute(
                "INSERT INTO charges (id, state) VALUES (?, 'tombstoned') "
                "ON CONFLICT (id) DO UPDATE SET state = 'tombstoned'",
                (key,),
            )

    def state(self, key: str) -> dict[str, Any]:
        """What is known of the charge."""
        with closing(self._open()) as db:
            found = db.execute("SELECT state FROM charges WHERE id = ?", (key,)).fetchone()
        return {"state": "absent" if found is None else found[0]}

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, timeout=10)
        db.execute("PRAGMA synchronous=FULL")
        return db


class Service(ThreadingHTTPServer):
    """``lose_every``: of so many changes one is made and its reply is lost; ``delay_s`` is before a charge is made."""

    daemon_threads = True

    def __init__(self, port: int, charges: Charges, *, lose_every: int = 0, delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.charges = charges
        self.delay_s = delay_s
        self._lose_every = lose_every
        self._changes = 0
        self._lock = threading.Lock()

    def loses_this_reply(self) -> bool:
        """Whether the change just made is one whose reply is lost."""
        with self._lock:
            self._changes += 1
            return self._lose_every > 0 and self._changes % self._lose_every == 0


class Handler(BaseHTTPRequestHandler):
    """``PUT``, ``DELETE`` and ``GET /charges/ID``."""

    server: Service

    def do_PUT(self) -> None:
        """Charge."""
        time.sleep(self.server.delay_s)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self._reply(200, self.server.charges.charge(self._key, asked["account"], asked["cents"]), change=True)
        except Refusal as no:
            self._reply(no.http, no.told)

    def do_DELETE(self) -> None:
        """Take back."""
        self.server.charges.take_back(self._key)
        self._reply(200, {}, change=True)

    def do_GET(self) -> None:
        """Tell."""
        self._reply(200, self.server.charges.state(self._key))

    @property
    def _key(self) -> str:
        return self.path.removeprefix("/charges/")

    def _reply(self, status: int, body: dict[str, Any], *, change: bool = False) -> None:
        if change and self.server.loses_this_reply():
            self.close_connection = True
            return
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it so
        """Say nothing."""


def main() -> None:
    """Serve until killed; the first line printed is the URL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--db", required=True, help="the SQLite file")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--lose-every", type=int, default=0, help="make every Nth change and lose its reply")
    parser.add_argument("--delay-s", type=float, default=0.0, help="seconds before a charge is made")
    parser.add_argument("--closed", action="append", default=[], help="an account that cannot be charged")
    asked = parser.parse_args()
    charges = Charges(asked.db, frozenset(asked.closed))
    service = Service(asked.port, charges, lose_every=asked.lose_every, delay_s=asked.delay_s)
    print(f"http://127.0.0.1:{service.server_address[1]}", flush=True)
    service.serve_forever()


if __name__ == "__main__":
    main()
