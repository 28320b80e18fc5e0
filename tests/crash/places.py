"""Where lives are lived: databases copied from a prepared one, each with a folder for what lies beside it."""

from __future__ import annotations

import itertools
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.crash.invariants import check
from tests.crash.life import RUNS, Blow
from tests.crash.lives import KILLED, Lives
from tests.crash.outside import LEDGER

LANES = 2
LIVES_MOST = 4
LOG_TAIL = 4_000
DEADLY = ("kill", "clock", "storm")


@dataclass(frozen=True)
class Place:
    """One database and the folder with its services' log and what callers were told."""

    url: str
    folder: Path

    @property
    def visits(self) -> list[str]:
        """The failpoints that were passed, in order."""
        return (self.folder / "visits").read_text().split()

    @property
    def struck(self) -> bool:
        """Whether something befell it."""
        return '"what": "struck"' in (self.folder / "told").read_text()

    def problem(self, what: str) -> str:
        log = self.folder / "log"
        told = (self.folder / "told").read_text()
        tail = log.read_text(errors="replace")[-LOG_TAIL:] if log.exists() else ""
        return f"{what}\n-- told\n{told}\n-- log\n{tail}\n-- kept in {self.folder}"


class SqlitePlaces:
    """SQLite files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def empty(self) -> Place:
        return self._place()

    def copy(self, source: Place) -> Place:
        place = self._place()
        shutil.copytree(source.folder, place.folder, dirs_exist_ok=True)
        return place

    def _place(self) -> Place:
        folder = self._folder / f"place-{next(self._numbers)}"
        folder.mkdir()
        return Place(f"sqlite+aiosqlite:///{folder / 'spine.db'}", folder)

    def execute(self, place: Place, sql: str) -> None:
        with closing(sqlite3.connect(place.folder / "spine.db")) as database:
            database.execute(sql)
            database.commit()

    def drop(self, place: Place) -> None:
        """Nothing: the database lies in its folder."""


class PostgresqlPlaces:
    """Databases of one PostgreSQL server."""

    def __init__(self, folder: Path, server: str, prefix: str) -> None:
        self._folder = folder
        self._server = server.replace("+psycopg", "")
        self._base = server.rpartition("/")[0]
        self._prefix = prefix
        self._numbers = itertools.count()

    def _ask(self, sql: str, url: str = "") -> None:
        import psycopg

        with psycopg.connect(url.replace("+psycopg", "") or self._server, autocommit=True) as server:
            server.execute(sql)

    def empty(self) -> Place:
        return self._place("template0")

    def copy(self, source: Place) -> Place:
        name = source.url.rpartition("/")[2]
        # A killed client's session ends when the server notices; a copy is made of what nobody is connected to.
        self._ask(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{name}'")
        place = self._place(name)
        shutil.copytree(source.folder, place.folder, dirs_exist_ok=True)
        return place

    def _place(self, template: str) -> Place:
        name = f"{self._prefix}_{next(self._numbers)}"
        folder = self._folder / name
        folder.mkdir()
        self._ask(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return Place(f"{self._base}/{name}", folder)

    def execute(self, place: Place, sql: str) -> None:
        self._ask(sql, place.url)

    def drop(self, place: Place) -> None:
        self._ask(f'DROP DATABASE "{place.url.rpartition("/")[2]}" WITH (FORCE)')


class Stage:
    """Runs cases, ``LANES`` at a time, each on its own copy of a prepared database."""

    def __init__(self, places: SqlitePlaces | PostgresqlPlaces, idle: SimpleQueue[Lives]) -> None:
        self._places = places
        self._idle = idle
        self._pool = ThreadPoolExecutor(LANES, "crash")
        self._made: list[Place] = []
        self._new = self._added(places.empty())
        self._live(self._new)
        places.execute(self._new, LEDGER)
        calm = self._copy(self._new)
        self._live(calm, RUNS)
        check(calm.url, calm.folder)
        self.visits = Counter(calm.visits)
        self.recovery_visits: set[str] = set()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for place in self._made:
            self._places.drop(place)

    def submit(self, case: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(case, *arguments)

    def _added(self, place: Place) -> Place:
        self._made.append(place)
        return place

    def _copy(self, source: Place) -> Place:
        return self._added(self._places.copy(source))

    @contextmanager
    def _case(self, source: Place) -> Iterator[Place]:
        """A copy; if the case fails, its folder is kept."""
        place = self._copy(source)
        try:
            yield place
        except AssertionError as error:
            raise AssertionError(place.problem(str(error))) from error
        self._made.remove(place)
        self._places.drop(place)
        shutil.rmtree(place.folder)

    def _live(self, place: Place, runs: Sequence[str] = (), blow: Blow | None = None, *, beside: bool = False) -> int:
        """One life, ``beside`` another one that recovers and that nothing befalls; its exit status."""
        lives = self._idle.get()
        try:
            statuses = lives.together(place.url, place.folder, [(runs, blow), *([((), None)] if beside else [])])
        finally:
            self._idle.put(lives)
        dies = blow is not None and blow.kind in DEADLY
        assert statuses[0] == 0 or (dies and statuses[0] == KILLED), f"a life with {blow} ended with {statuses[0]}"
        assert statuses[1:] in ([], [0]), f"a life beside one with {blow} ended with {statuses[1]}"
        return statuses[0]

    def _recovered(self, place: Place) -> None:
        self._live(place)
        check(place.url, place.folder)

    # -- cases

    def strike(self, blow: Blow) -> None:
        """Something befalls the working application; what it leaves is recovered by the next one."""
        with self._case(self._new) as place:
            status = self._live(place, RUNS, blow)
            assert place.struck or blow.n > 1, f"nothing befell it: {blow} was never reached"
            assert (status == KILLED) is (blow.kind == "kill" and place.struck), f"{blow} ended it with {status}"
            self._recovered(place)
            struck = place.struck
        if not struck:
            # As often as that it is passed on some days only.
            self.strike(replace(blow, n=1))

    def death(self, blow: Blow) -> tuple[Place, Counter[str]]:
        """What a killed application leaves, and which failpoints are passed while it is recovered."""
        place = self._copy(self._new)
        assert self._live(place, RUNS, blow) == KILLED, f"{blow} was never reached"
        (place.folder / "visits").unlink()
        with self._case(place) as calm:
            self._recovered(calm)
            visits = Counter(calm.visits)
        self.recovery_visits |= visits.keys()
        return place, visits

    def strike_again(self, left: Place, blow: Blow, runs: Sequence[str], *, beside: bool) -> None:
        """Something befalls the application that recovers what a killed one ``left``; the last one ends it.

        Its callers complete the ``runs`` once more meanwhile; another process may recover ``beside`` it.
        """
        with self._case(left) as place:
            self._live(place, runs, blow, beside=beside)
            self._recovered(place)

    def storm(self, seed: int) -> None:
        """At any moment anything, in one life after the other, some of them beside others; then a calm one."""
        chance = random.Random(seed)
        with self._case(self._new) as place:
            for life in range(chance.randint(1, LIVES_MOST)):
                blow = chance.choice((Blow("storm", n=chance.getrandbits(32)), Blow("clock", n=chance.randint(1, 250))))
                runs = () if life and chance.random() < 0.5 else RUNS
                self._live(place, runs, blow, beside=chance.random() < 0.3)
            self._recovered(place)
