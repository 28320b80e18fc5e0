"""P1: an ask through the spine mailbox to a supervised actor, against Pykka's nested ask."""

from __future__ import annotations

from benchmarks.harness import Line, Plan, Side, compare, interleave

OURS = Side("spine", "sides.kernel_ask")
PYKKA = Side("pykka", "peers.pykka_ask")


def p1(plan: Plan) -> list[Line]:
    samples = interleave([OURS, PYKKA], plan)
    ours, pykka = samples[OURS.name], samples[PYKKA.name]
    return [
        compare(
            "P1",
            "kernel ask, 100 callers, against Pykka's nested ask, 100 threads: throughput",
            ("spine", ours, "ask_100"),
            ("pykka", pykka, "ask_100"),
            (">=", 12.0),
        ),
        compare(
            "P1",
            "kernel ask, one caller, against Pykka's nested ask: latency",
            ("spine", ours, "ask_alone_us"),
            ("pykka", pykka, "ask_alone_us"),
            ("<=", 0.45),
        ),
    ]
