"""Whatever domains do, whichever of two Spines is asked and whenever one restarts: the journal agrees with a reference.

A long run: ``SPINE_TEST_EXAMPLES=2000 pytest tests/properties/test_completions.py``.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spine import CompletionConflict, Refused, RunFacts, Spine, TransactionFailed, Write
from spine.domains import effect_id
from spine.kernel.errors import ConfigurationError
from spine.settings import Retry
from tests.governed import Published, intact, journal, query, until
from tests.participants import Behaviour, Do, Probed, Remote, Sender, World, complete, over
from tests.properties.completion_reference import FORWARD, ORDER, ROLLBACK, UNDER, Reference

LONG = os.environ.get("SPINE_TEST_EXAMPLES")
EXAMPLES = int(LONG or 30)
RUNS = ("run-1", "run-2")
# So short that not even three callers in turn wait as long as a call may take; what was skipped is not waited for.
TIMEOUT_S = 1.0


class SkippingClock:
    """Real time and what was skipped of it: nobody waits for a domain that hangs, and nobody's work is hurried."""

    def __init__(self) -> None:
        self._skipped = 0.0
        self._sleepers: set[asyncio.Event] = set()

    def monotonic(self) -> float:
        return time.monotonic() + self._skipped

    def time_us(self) -> int:
        return time.time_ns() // 1000 + round(self._skipped * 1e6)

    async def sleep_until(self, moment: float) -> None:
        while (left := moment - self.monotonic()) > 0:
            woken = asyncio.Event()
            self._sleepers.add(woken)
            with anyio.move_on_after(left):
                await woken.wait()
            self._sleepers.discard(woken)

    def skip(self, seconds: float) -> None:
        self._skipped += seconds
        for sleeper in self._sleepers:
            sleeper.set()


class Book:
    """A LOCAL domain that comes last."""

    name, after = "book", ("ship", "points")

    def __init__(self) -> None:
        self.does = "well"

    def plan(self, run: RunFacts) -> list[Write]:
        assert set(run.results) == set(ORDER)
        if self.does == "refuses":
            raise Refused("CLOSED", "the books are closed")
        return [Write("UPDATE runs SET run_id = run_id WHERE run_id = 'none'", rows=0 if self.does == "well" else 1)]


def mostly_well(others: Any) -> st.SearchStrategy[str]:
    return st.one_of(st.just("well"), st.just("well"), st.sampled_from(sorted(others)))


does = st.fixed_dictionaries(
    {**{name: mostly_well(FORWARD) for name in ORDER}, "book": mostly_well(["refuses", "changes nothing"])}
)
undoes = st.fixed_dictionaries({name: mostly_well(ROLLBACK) for name in ORDER})


class Completions(RuleBasedStateMachine):
    """Two Spines on one SQLite file, their event loop, and systems outside that live longer than they do."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = Reference()
        self.ids: dict[int, str] = {}

    @initialize(probed=st.booleans())
    def start(self, probed: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("actors.takeover.TICK_S", 0.01)
        self.patch.setattr("actors.outbox.RELOAD_S", 0.05)
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"sqlite+aiosqlite:///{Path(self.folder.name) / 'spine.db'}"
        self.runner = asyncio.Runner()
        self.clock, self.world, self.publisher, self.book = SkippingClock(), World(), Published(), Book()
        kind = Probed if probed else Remote
        self.remotes = {
            name: kind(self.world, name, after=[UNDER[name]] if name in UNDER else [], timeout_s=TIMEOUT_S, attempts=2)
            for name in ORDER
        }
        self.mail = Sender(self.world)
        self.stopped = asyncio.Event()
        self.spines = [self._spine() for _ in range(2)]
        for spine in self.spines:
            self.run(spine.start())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            try:
                for spine in self.spines:
                    self.run(spine.stop())
                intact(self.url)
            finally:
                self.runner.close()
                self.folder.cleanup()
                self.patch.undo()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, 30))

    def _spine(self) -> Spine:
        return over(
            self.url,
            *self.remotes.values(),
            self.book,
            self.mail,
            publisher=self.publisher,
            clock=self.clock,
            drain_s=0.01,
            retry=Retry(attempts=2, first_s=0, most_s=0),
        )

    async def _restart(self, at: int) -> None:
        self.stopped.clear()
        instance = self.spines[at]._system.dependencies.instance  # type: ignore[union-attr]
        await self.spines[at].stop()
        # As if its lease had run out meanwhile: the other one, or its own successor, goes on with what it left.
        query(self.url, "DELETE FROM instances WHERE instance = ?", instance)
        self.spines[at] = self._spine()
        await self.spines[at].start()

    def _behave(self, does: dict[str, str], undoes: dict[str, str]) -> None:
        self.book.does = does["book"]
        for name, remote in self.remotes.items():
            remote.forwards, remote.rollbacks = self._behaviour(does[name]), self._behaviour(undoes[name])

    def _behaviour(self, how: str) -> Behaviour:
        async def behave(do: Do) -> Any:
            first = self.world.calls[-1].effect.attempt == 1
            if how in ("loses one reply", "loses every reply", "refuses late", "is stopped", "answers nonsense"):
                do()
            match how:
                case "fails" | "loses every reply":
                    raise ConnectionError(how)
                case "fails once" | "loses one reply" if first:
                    raise ConnectionError(how)
                case "refuses" | "refuses late":
                    raise Refused("NO", how)
                case "hangs":
                    self.clock.skip(TIMEOUT_S)
                    await asyncio.Event().wait()
                case "is stopped":
                    self.stopped.set()
                    await asyncio.Event().wait()
                case "answers nonsense":
                    return 5
            return do()

        return behave

    # -- what happens

    @rule(
        run=st.sampled_from(RUNS),
        key=st.sampled_from(["", "key"]),
        status=st.sampled_from(["succeeded", "succeeded", "failed"]),
        does=does,
        undoes=undoes,
        at=st.sampled_from([0, 1]),
        callers=st.sampled_from([1, 1, 1, 3]),
    )
    def complete(
        self, run: str, key: str, status: str, does: dict[str, str], undoes: dict[str, str], at: int, callers: int
    ) -> None:
        if "is stopped" in does.values():
            # Whether the successor finds a tombstone depends on how far the one that stops has come.
            callers, undoes = 1, {name: how.replace("loses every reply", "well") for name, how in undoes.items()}
        self._behave(does, undoes)
        told = self.run(self._complete(run, key, status, at, callers))
        expected = self.reference.complete(run, key, status, does, undoes)
        if told != ["IN_FLIGHT"] or "is stopped" not in does.values():
            # Who asks while it is under way is told what came of it: one attempt for all of them.
            assert told == [expected] * callers, (told, expected)

    async def _complete(self, run: str, key: str, status: str, at: int, callers: int) -> list[str]:
        calls = [asyncio.ensure_future(self._told(self.spines[at], run, key, status)) for _ in range(callers)]
        stopped = asyncio.ensure_future(self.stopped.wait())
        await asyncio.wait([stopped, asyncio.gather(*calls)], return_when=asyncio.FIRST_COMPLETED)
        if self.stopped.is_set():
            await self._restart(at)
        stopped.cancel()
        return list(await asyncio.gather(*calls))

    async def _told(self, spine: Spine, run: str, key: str, status: str) -> str:
        try:
            done = await complete(spine, run, status, completion_key=key)
        except CompletionConflict:
            return "CONFLICT"
        except TransactionFailed as error:
            if error.code == "IN_FLIGHT":
                return "IN_FLIGHT"
            return {"ROLLED_BACK": "ABORTED", "PARKED": "PARKED"}[error.phase]
        assert done.is_complete and done.all_domains_succeeded
        return "COMMITTED"

    @rule(at=st.sampled_from([0, 1]))
    def restart(self, at: int) -> None:
        self.run(self._restart(at))

    def parked(self) -> list[int]:
        return [n for n, attempt in enumerate(self.reference.attempts) if attempt.state == "PARKED"]

    @precondition(parked)
    @rule(data=st.data(), undoes=undoes)
    def retry(self, data: st.DataObject, undoes: dict[str, str]) -> None:
        n = data.draw(st.sampled_from(self.parked()))
        attempt = self.reference.attempts[n]
        self._behave(dict.fromkeys([*ORDER, "book"], "well"), undoes)
        if isinstance(self.remotes["pay"], Probed):
            # Who can tell that an effect is undone is not asked to undo it.
            tombs = {name for name in ORDER if effect_id(self.ids[n], name) in self.world.tombs}
            undoes = {name: "well" if name in tombs else how for name, how in undoes.items()}
        self.run(self.spines[n % 2].retry(self.ids[n], reason="again", actor="op"))
        self.reference.undo(attempt, undoes)

    @precondition(parked)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(self.parked()))
        self.run(self.spines[0].resolve(self.ids[n], evidence="seen", reason="by hand", actor="op"))
        self.reference.resolve(self.reference.attempts[n])

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def operate_on_what_is_not_parked(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from(sorted(self.ids)))
        if n not in self.parked():
            with pytest.raises(ConfigurationError, match="not PARKED"):
                self.run(self.spines[0].retry(self.ids[n], reason="again", actor="op"))

    # -- what must hold

    @invariant()
    def the_journal_says_what_the_reference_says(self) -> None:
        if hasattr(self, "runner"):
            self.run(until(self._settled))
            self._compare()

    def _settled(self) -> bool:
        busy = "SELECT 1 FROM transactions WHERE state IN ('EXECUTING', 'COMPENSATING')"
        pending = "SELECT 1 FROM outbox WHERE state = 'pending'"
        return not query(self.url, f"{busy} UNION ALL {pending}")

    def _compare(self) -> None:
        attempts = self.reference.attempts
        found = query(self.url, "SELECT tx_id, run_id, completion_key, state FROM transactions ORDER BY seq_begun")
        assert [row[1:] for row in found] == [(a.run, a.key, a.state) for a in attempts]
        self.ids = {n: row[0] for n, row in enumerate(found)}
        numbers = {tx_id: n for n, tx_id in self.ids.items()}

        steps: dict[int, dict[str, str]] = {n: {} for n in self.ids}
        for tx_id, domain, state in query(self.url, "SELECT tx_id, domain, state FROM steps WHERE class = 'EXTERNAL'"):
            steps[numbers[tx_id]][domain] = state
        resolved = [n for n, attempt in enumerate(attempts) if attempt.state == "ABORTED_MANUAL"]
        assert steps == {n: attempt.steps for n, attempt in enumerate(attempts)}, resolved

        acks: dict[int, list[tuple[str, str]]] = {n: [] for n in self.ids}
        for body in journal(self.url, "ack"):
            if body.get("tx_id") and body["domain"] in (*ORDER, "orchestrator"):
                acks[numbers[body["tx_id"]]].append((body["domain"], body["status"]))
        assert acks == {n: attempt.acks for n, attempt in enumerate(attempts)}

        live: dict[int, set[str]] = {n: set() for n in self.ids}
        effects = {call.effect.id: call.effect for call in self.world.calls}
        for effect, domain in self.world.live.items():
            live[numbers[effects[effect].tx_id]].add(domain)
        committed = [n for n, attempt in enumerate(attempts) if attempt.state == "COMMITTED"]
        assert live == {n: a.live | ({"mail"} if n in committed else set()) for n, a in enumerate(attempts)}

        told = list(dict.fromkeys(numbers[event.tx_id] for event in self.publisher.events))
        assert sorted(told) == committed
        for run in RUNS:
            ours = [n for n in told if attempts[n].run == run]
            assert ours == sorted(ours, key=lambda n: self._ended(self.ids[n]))
            self._compare_verdict(run)

    def _ended(self, tx_id: str) -> int:
        ((seq,),) = query(self.url, "SELECT seq_ended FROM transactions WHERE tx_id = ?", tx_id)
        return int(seq)

    def _compare_verdict(self, run: str) -> None:
        expected = self.reference.verdict(run)
        if expected is None:
            with pytest.raises(LookupError):
                self.run(self.spines[0].why(run))
        else:
            why = self.run(self.spines[0].why(run))
            assert (why.verdict, why.evidence["intact"]) == (expected, True)


TestCompletions = Completions.TestCase
TestCompletions.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=8,
    deadline=None,
    # To find the shortest way to a failure takes minutes: that is for a long run.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if LONG else [])],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestCompletions.pytestmark = [pytest.mark.timeout(0 if LONG else 60)]
