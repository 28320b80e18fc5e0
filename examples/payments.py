"""An EXTERNAL domain over HTTP: every completed run is charged for, or charged for nothing.

Run it with ``python examples/payments.py``: it starts the service of ``payments_service.py``, which loses every third
reply, and completes three runs. ``spine why run-2`` then tells why the second one was rolled back.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread

from spine import Effect, Refused, RunFacts, Spine, TransactionFailed

BASE_CENTS = 100
OPERATION_CENTS = 5
OK = 200
REFUSED = (402, 410)


class Payments:
    """Charges a tenant for its run. The effect's id names the charge; the service alone knows what was done."""

    name = "payments"
    action = "charge"
    after = ()
    timeout_s = 2.0
    attempts = 3

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc

    def describe(self, run: RunFacts) -> dict[str, object]:
        """What is charged: recorded before the service is asked for the first time."""
        return {"account": run.tenant_id, "cents": BASE_CENTS + OPERATION_CENTS * run.operations}

    async def forward(self, effect: Effect) -> dict[str, Any]:
        """Charge; a business no is ``Refused``, whatever else goes wrong is raised as it is and tried again."""
        status, charged = await self._call("PUT", effect, effect.descriptor)
        if status in REFUSED:
            raise Refused(charged["code"], charged["reason"])
        return charged

    async def rollback(self, effect: Effect) -> None:
        """Take the charge back, or see to it that it never happens."""
        await self._call("DELETE", effect)

    async def status(self, effect: Effect) -> str:
        """What the service knows of the charge, in the words that Spine understands."""
        _, answer = await self._call("GET", effect)
        return str(answer["state"])

    async def _call(
        self, method: str, effect: Effect, body: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        left_s = max(0.05, effect.deadline - time.monotonic())
        # Spine cancels a call at its deadline; the thread's own timeout sees to it that it does not wait for ever.
        return await to_thread.run_sync(
            partial(self._send, method, f"/charges/{effect.id}", body, left_s), abandon_on_cancel=True
        )

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self._address, timeout=timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(dict(body)))
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != OK and response.status not in REFUSED:
            raise http.client.HTTPException(f"the payment service answered {response.status} to {method} {path}")
        answer: dict[str, Any] = json.loads(text)
        return response.status, answer


@contextmanager
def service(*options: str) -> Iterator[str]:
    """The service in a process of its own, by its URL."""
    program = Path(__file__).with_name("payments_service.py")
    command = [sys.executable, str(program), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  our own program
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def main(url: str) -> None:
    """Three runs: charged, refused and rolled back, charged."""
    async with Spine(domains=[Payments(url)]) as spine:
        for run_id, tenant_id in (("run-1", "acme"), ("run-2", "globex"), ("run-3", "initech")):
            try:
                done = await spine.complete_run(run_id, tenant_id=tenant_id, run_status="succeeded")
                print(run_id, done.phase.value, "charged as", done.domains[-1].result_id)
            except TransactionFailed as failed:
                print(run_id, failed.phase.value, failed.code)
        print(await spine.why("run-2"))


if __name__ == "__main__":
    with service("--db", "payments.db", "--lose-every", "3", "--closed", "globex") as url:
        asyncio.run(main(url))
