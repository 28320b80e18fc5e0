"""Wherever a process dies, fails or is cancelled, and whatever becomes of a call, no transaction is ever half.

Every failpoint of ``spine.governance.failpoints`` times what may happen there (SIGKILL of a real process, an exception,
the cancellation of the task that stands there), every call of a domain and of the publisher times what may become of it
(a timeout, a lost reply, a duplicate), on SQLite and PostgreSQL, while the application works and while it recovers.
Afterwards the next process is started; when nothing is in flight ``tests/crash/invariants.py`` says what must hold.

Which visit of a failpoint is struck is a seeded choice; PostgreSQL and the recoveries are sampled. All of it, on every
visit: ``SPINE_TEST_CRASH=full pytest tests/crash/test_crash_matrix.py`` (see docs/crash-matrix.md).
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import pytest

from spine.governance.failpoints import CALLS, FAILPOINTS
from tests.crash.life import AT_FAILPOINTS, ON_CALLS, RUNS, Blow
from tests.crash.lives import Lives
from tests.crash.places import LANES, PostgresqlPlaces, SqlitePlaces, Stage

FULL = os.environ.get("SPINE_TEST_CRASH") == "full"
SEED = 3
RECOVERIES = 4
# All cases of a database are begun together: of everything, the last one ends late.
CASE_S = 7_200.0 if FULL else 50.0
pytestmark = pytest.mark.timeout(CASE_S + 10)

# Which call a mishap befalls, and the failpoint that is passed as often as it is made.
CALL_COUNTED_BY = {f"call.{method}": f"call.{method}.before" for method in CALLS} | {
    "call.publish": "event.publish.before"
}
# Where a first process dies so that the next one finds transactions in every state.
DEATHS = (
    Blow("kill", "tx.begin.after", 6),
    Blow("kill", "call.forward.before", 4),
    Blow("kill", "step.done.after", 3),
    Blow("kill", "step.intend.after", 14),
    Blow("kill", "tx.abort.after", 3),
    Blow("kill", "step.undo.after", 7),
    Blow("kill", "tx.retry.after", 1),
    Blow("kill", "event.published.before", 2),
)
# What nobody does who only recovers.
CALLERS_OWN = {f"tx.{move}.{when}" for move in ("begin", "retry", "resolve") for when in ("before", "after")}


def chosen(sample: int, *seed: object) -> random.Random:
    """The generator of a seeded choice."""
    return random.Random(" ".join(map(str, (SEED, sample, *seed))))


@dataclass(frozen=True)
class Strike:
    """One thing that befalls the working application at one point: at one of its visits, or at each of them."""

    database: str
    kind: str
    at: str

    def run(self, stage: Stage) -> None:
        count = stage.visits[CALL_COUNTED_BY[self.at] if self.kind in ON_CALLS else self.at]
        assert count, f"the scenarios never pass {self.at}"
        visits = range(1, count + 1)
        for n in visits if FULL else [chosen(1, self).choice(visits)]:
            stage.strike(Blow(self.kind, self.at, n))

    def __str__(self) -> str:
        return f"{self.database}-{self.kind}-{self.at}"


@dataclass(frozen=True)
class Recovery:
    """A process dies, and so does, at one of ``most`` moments or at any, the one that recovers what it left."""

    database: str
    death: Blow
    most: int

    def run(self, stage: Stage) -> None:
        left, visits = stage.death(self.death)
        moments = [Blow("kill", at, n) for at in visits for n in range(1, visits[at] + 1)]
        chance = chosen(self.most, self)
        for blow in moments if FULL else chance.sample(moments, self.most):
            runs = RUNS if chance.random() < 0.4 else ()
            stage.strike_again(left, blow, runs, beside=chance.random() < 0.4)

    def __str__(self) -> str:
        return f"{self.database}-{self.death.at}-{self.death.n}"


@dataclass(frozen=True)
class Storm:
    """Anything at any time."""

    database: str
    seed: int

    def run(self, stage: Stage) -> None:
        stage.storm(self.seed)

    def __str__(self) -> str:
        return f"{self.database}-{self.seed}"


Case = Strike | Recovery | Storm


def on(database: str, cases: list[Any], sample: int | None = None) -> list[Any]:
    """Test parameters; where there are too many for every day, ``sample`` of them."""
    if sample is not None and not FULL:
        cases = chosen(sample, database).sample(cases, sample)
    marks = [pytest.mark.postgresql] if database == "postgresql" else []
    return [pytest.param(case, id=str(case), marks=marks) for case in cases]


def strikes(database: str, kinds: tuple[str, ...], points: Any) -> list[Strike]:
    return [Strike(database, kind, at) for kind in kinds for at in points]


@pytest.fixture(scope="module")
def stages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Stage]]:
    """The stage of each kind of database, made when it is first asked for."""
    made: dict[str, Stage] = {}
    crew = [Lives() for _ in range(LANES)]
    idle: SimpleQueue[Lives] = SimpleQueue()
    for lives in crew:
        idle.put(lives)

    def of(database: str) -> Stage:
        if database not in made:
            folder = tmp_path_factory.mktemp(database)
            if database == "sqlite":
                made[database] = Stage(SqlitePlaces(folder), idle)
            else:
                server = request.getfixturevalue("postgresql_server")
                places = PostgresqlPlaces(folder, server, f"spine_crash_{uuid.uuid4().hex[:12]}")
                made[database] = Stage(places, idle)
        return made[database]

    yield of
    for stage in made.values():
        stage.close()
    for lives in crew:
        lives.close()


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, stages: Callable[[str], Stage]) -> Callable[[Case], None]:
    """Waits for a case's end and raises what it found; all cases of a database that are to run are begun together."""
    begun: dict[Case, Future[None]] = {}

    def of(case: Case) -> None:
        if case not in begun:
            stage = stages(case.database)
            mine = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
            for other in (*mine, case):
                if isinstance(other, Case) and other.database == case.database and other not in begun:
                    begun[other] = stage.submit(other.run, stage)
        begun[case].result(CASE_S)

    return of


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def test_the_scenarios_pass_every_failpoint_there_is(database: str, stages: Callable[[str], Stage]) -> None:
    """Undisturbed, they commit, refuse, raise, time out, park, retry and resolve; a new failpoint needs a new one."""
    assert stages(database).visits.keys() == set(FAILPOINTS)


@pytest.mark.parametrize(
    "case",
    [
        *on("sqlite", strikes("sqlite", AT_FAILPOINTS, FAILPOINTS)),
        *on("postgresql", strikes("postgresql", AT_FAILPOINTS, FAILPOINTS), sample=14),
    ],
)
def test_whatever_happens_at_a_failpoint_nothing_is_half(case: Case, outcome: Callable[[Case], None]) -> None:
    """The process is killed there, an exception is raised there, the task that stands there is cancelled."""
    outcome(case)


@pytest.mark.parametrize(
    "case",
    [
        *on("sqlite", strikes("sqlite", ON_CALLS, CALL_COUNTED_BY)),
        *on("postgresql", strikes("postgresql", ON_CALLS, CALL_COUNTED_BY), sample=4),
    ],
)
def test_whatever_becomes_of_a_call_nothing_is_half(case: Case, outcome: Callable[[Case], None]) -> None:
    """It arrives and is never answered, its reply is lost, it arrives twice and once more at the very end."""
    outcome(case)


@pytest.mark.parametrize(
    "case",
    [
        *on("sqlite", [Recovery("sqlite", death, RECOVERIES) for death in DEATHS]),
        *on("postgresql", [Recovery("postgresql", death, RECOVERIES) for death in DEATHS], sample=2),
    ],
)
def test_a_process_killed_while_it_recovers_is_recovered(case: Case, outcome: Callable[[Case], None]) -> None:
    """The second process is killed anywhere in its recovery; another may recover beside it, callers may ask again."""
    outcome(case)


def test_recoveries_pass_every_failpoint_but_the_callers_own(
    stages: Callable[[str], Stage], outcome: Callable[[Case], None]
) -> None:
    """The first processes die where it takes all of them to recover what they leave."""
    for death in DEATHS:
        outcome(Recovery("sqlite", death, RECOVERIES))
    assert stages("sqlite").recovery_visits == set(FAILPOINTS) - CALLERS_OWN


@pytest.mark.parametrize(
    "case",
    [
        *on("sqlite", [Storm("sqlite", seed) for seed in range(100)], sample=6),
        *on("postgresql", [Storm("postgresql", seed) for seed in range(100)], sample=2),
    ],
)
def test_a_storm_of_everything_leaves_nothing_half(case: Case, outcome: Callable[[Case], None]) -> None:
    """Exceptions, cancellations and kills at random moments, in several lives, some of them beside others."""
    outcome(case)
