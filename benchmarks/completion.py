"""P4: a run's completion, committed and its event published, against DBOS's workflow of three steps."""

from __future__ import annotations

from benchmarks.databases import postgresql_reachable
from benchmarks.harness import Line, Plan, Side, compare, fastest, interleave

OURS = Side("spine", "sides.run_completion")
POSTGRESQL = Side("spine, PostgreSQL", "sides.run_completion", ("--database", "postgresql"))
THREE_STEPS = ("--mode", "best", "--steps", "3")
BEST = Side("dbos at its best", "peers.dbos_workflow", THREE_STEPS)
BEST_ONE = Side("dbos at its best, one connection", "peers.dbos_workflow", (*THREE_STEPS, "--pool", "1"))


def p4(plan: Plan) -> list[Line]:
    """A completion that also starts its run does what the peer's workflow does: begin, three parts, end."""
    reachable = postgresql_reachable()
    samples = interleave([OURS, BEST, BEST_ONE, *([POSTGRESQL] if reachable else [])], plan)
    ours, peers = samples[OURS.name], {side.name: samples[side.name] for side in (BEST, BEST_ONE)}
    best, alone = fastest(peers, "workflow"), fastest(peers, "workflow_1", exact=True)
    lines = [
        compare(
            "P4",
            "completion of a run never started, 100 callers, against DBOS's three-step workflow at its best",
            ("spine", ours, "start_and_complete_100"),
            best,
            (">=", 10.0),
        ),
        compare(
            "P4",
            "completion of a run started before, 100 callers, against the same",
            ("spine", ours, "complete_100"),
            best,
            (">=", 10.0),
        ),
        compare(
            "P4",
            "completion of a run never started, one caller, against DBOS at its best, one caller",
            ("spine", ours, "start_and_complete_1"),
            alone,
            None,
        ),
        compare(
            "P4",
            "completion of a run started before, one caller, against the same",
            ("spine", ours, "complete_1"),
            alone,
            None,
        ),
    ]
    if reachable:
        lines += [
            compare(
                "P4",
                f"PostgreSQL against SQLite, run started before, {name.rpartition('_')[2]} caller(s)",
                ("spine, PostgreSQL", samples[POSTGRESQL.name], name),
                ("spine, SQLite", ours, name),
                None,
            )
            for name in ("complete_100", "complete_1")
        ]
    return lines
