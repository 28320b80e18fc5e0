"""P2 and P3: a governed operation, committed against DBOS and a bare group-commit actor, buffered against Pykka."""

from __future__ import annotations

from benchmarks.databases import postgresql_reachable
from benchmarks.harness import Line, Plan, Side, compare, fastest, interleave

OURS = Side("spine", "sides.governed_operation")
BUFFERED = Side("spine, buffered", "sides.governed_operation", ("--durability", "buffered"))
POSTGRESQL = Side("spine, PostgreSQL", "sides.governed_operation", ("--database", "postgresql"))
INSTALLED = Side("dbos as installed", "peers.dbos_workflow", ("--mode", "installed"))
BEST = Side("dbos at its best", "peers.dbos_workflow", ("--mode", "best"))
BEST_ONE = Side("dbos at its best, one connection", "peers.dbos_workflow", ("--mode", "best", "--pool", "1"))
BARE = Side("bare group-commit actor", "peers.bare_commit")
PYKKA = Side("pykka", "peers.pykka_ask")


def p2(plan: Plan) -> list[Line]:
    """The fastest of DBOS at its best, at any number of callers, and the fastest of it alone."""
    reachable = postgresql_reachable()
    sides = [OURS, BARE, BEST, BEST_ONE, INSTALLED, *([POSTGRESQL] if reachable else [])]
    samples = interleave(sides, plan)
    ours, bare = samples[OURS.name], samples[BARE.name]
    installed = samples[INSTALLED.name]
    peers = {side.name: samples[side.name] for side in (BEST, BEST_ONE)}
    lines = [
        compare(
            "P2",
            "governed operation, committed, 100 callers, against DBOS's one-step workflow at its best",
            ("spine", ours, "execute_100"),
            fastest(peers, "workflow"),
            (">=", 30.0),
        ),
        compare(
            "P2",
            "the same against a bare group-commit actor, 100 callers",
            ("spine", ours, "execute_100"),
            ("bare actor", bare, "commit_100"),
            (">=", 0.2),
        ),
        compare(
            "P2",
            "one caller, against DBOS at its best, one caller",
            ("spine", ours, "execute_1"),
            fastest(peers, "workflow_1", exact=True),
            (">=", 2.0),
        ),
        compare(
            "P2",
            "100 callers, against DBOS as installed, its fastest number of callers",
            ("spine", ours, "execute_100"),
            ("dbos as installed", installed, installed.best("workflow")),
            None,
        ),
    ]
    if reachable:
        postgresql = samples[POSTGRESQL.name]
        lines += [
            compare(
                "P2",
                f"PostgreSQL against SQLite, {name.rpartition('_')[2]} caller(s)",
                ("spine, PostgreSQL", postgresql, name),
                ("spine, SQLite", ours, name),
                None,
            )
            for name in ("execute_100", "execute_1")
        ]
    return lines


def p3(plan: Plan) -> list[Line]:
    samples = interleave([BUFFERED, PYKKA], plan)
    return [
        compare(
            "P3",
            "governed operation, buffered, until its last commit, 100 callers, against Pykka's bare nested ask",
            ("spine", samples[BUFFERED.name], "execute_100"),
            ("pykka, 100 threads", samples[PYKKA.name], "ask_100"),
            (">=", 1.0),
        )
    ]
