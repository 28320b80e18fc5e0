"""What is tried on a LOCAL domain: nothing but its ``plan`` is to be seen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from spine.domains import Refused, RunFacts
from spine.governance.units import Write
from spine.kernel.clock import SystemClock
from spine.kernel.errors import describe
from spine.testing.bench import Bench, Broken, Unseen
from spine.testing.clauses import BLOCKED_S


async def writes(bench: Bench) -> None:
    """A plan is a sequence of Write objects."""
    _plan(bench.domain, bench.completion())


async def pure(bench: Bench) -> None:
    """The same facts have the same writes: a transaction is planned again when the ground moves."""
    run = bench.completion()
    first = _plan(bench.domain, run)
    for by in (bench.domain, bench.another()):
        if (again := _plan(by, run)) != first:
            raise Broken(f"plan(run) gave {first!r:.300}, and of the same facts {again!r:.300}")


async def free(bench: Bench) -> None:
    """A plan does not keep the event loop waiting; the better of two tries counts, for a machine may be busy."""
    run, took_s = bench.completion(), []
    for _ in range(2):
        began = SystemClock.monotonic()
        _plan(bench.domain, run)
        took_s.append(SystemClock.monotonic() - began)
    if (seconds := min(took_s)) >= BLOCKED_S:
        raise Broken(f"plan(run) took {seconds:.1f} s, in which nothing else could run")


async def refuses(bench: Bench) -> None:
    """A business no raises Refused."""
    if bench.refused is None:
        raise Unseen("no completion is known that the domain refuses: pass its facts as refused=")
    try:
        planned = bench.domain.plan(bench.completion(bench.refused))
    except Refused:
        return
    except Exception as error:
        raise Broken(f"plan(run) of what refused= says is refused raised {describe(error)}") from error
    raise Broken(f"plan(run) of what refused= says is refused gave {planned!r:.300}")


def _plan(domain: object, run: RunFacts) -> Sequence[Write]:
    try:
        planned: object = domain.plan(run)  # type: ignore[attr-defined]
    except Exception as error:
        raise Broken(f"plan(run) raised {describe(error)}") from error
    if inspect.iscoroutine(planned):
        planned.close()
    if not isinstance(planned, Sequence) or not all(isinstance(write, Write) for write in planned):
        raise Broken(f"plan(run) gave {planned!r:.300}")
    return planned
