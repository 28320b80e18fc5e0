"""An argument that is of no use to the check is refused by name: nothing is reported of what was not tried with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spine.domains import RunFacts
from spine.effects import Effect
from spine.kernel.errors import ConfigurationError
from spine.testing import check_domain
from tests.unit.kept_domain import Kept, World

pytestmark = pytest.mark.anyio


class Named(Kept):
    name = "somebody-else"


class Posts:
    """Takes part after the commit."""

    name, after = Kept.name, ()

    async def post(self, effect: Effect) -> None:
        pass


def breaks() -> object:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda _: None, "domain None has no name"),
        (lambda kept: kept, "the very object that is checked"),
        (lambda _: Named(World()), "EXTERNAL domain 'somebody-else'"),
        (lambda _: Posts(), "POST domain 'kept'"),
        (lambda _: Kept, "pass an instance of it"),
        (lambda _: breaks(), "ZeroDivisionError: a bug"),
    ],
    ids=["none", "same", "other-name", "other-class", "a-class", "raises"],
)
async def test_a_restarted_that_does_not_make_the_domain_anew_is_refused(
    made: Callable[[Kept], object], told: str
) -> None:
    """A forgotten ``return`` would have the check try the old object, whose memory no restart has wiped."""
    kept = Kept(world := World())
    with pytest.raises(ConfigurationError, match=r"^restarted= ") as refused:
        await check_domain(kept, live=world.live, restarted=lambda: made(kept))
    assert told in str(refused.value)
    assert not any(world.held.values()), "what the check did until then is rolled back"


async def test_a_local_domain_is_made_anew_too() -> None:
    class Rows:
        name, after = "rows", ()

        def plan(self, run: RunFacts) -> list[Any]:
            return []

    rows = Rows()
    with pytest.raises(ConfigurationError, match="restarted= gave the very object"):
        await check_domain(rows, restarted=lambda: rows)


async def test_a_domain_that_is_falsy_is_made_anew_all_the_same() -> None:
    """It may have a length, and be empty."""

    class Empty(Kept):
        def __len__(self) -> int:
            return 0

        async def forward(self, effect: Effect) -> Any:
            asked.add(id(self))
            return await super().forward(effect)

    asked: set[int] = set()
    first = Empty(world := World())
    made: list[Empty] = []

    def anew() -> Empty:
        made.append(Empty(world))
        return made[-1]

    report = await check_domain(first, live=world.live, restarted=anew)
    assert "restart" in {finding.clause for finding in report.passed}
    assert asked - {id(first)} <= {id(one) for one in made}
    assert asked & {id(one) for one in made}


@pytest.mark.parametrize("count", ["many", None, 1.5, -1])
async def test_a_probe_that_does_not_count_is_refused(count: Any) -> None:
    async def live(effect: Effect) -> Any:
        return count

    with pytest.raises(ConfigurationError, match=r"live= gave .* how many"):
        await check_domain(Kept(World()), live=live)


@pytest.mark.parametrize("name", ["facts", "refused"])
async def test_facts_that_are_none_are_refused_before_anything_is_called(name: str) -> None:
    world = World()
    for wrong in ("x", "", {}):
        arguments: Any = {name: wrong}
        with pytest.raises(ConfigurationError, match=f"^{name}= must be RunFacts, not {type(wrong).__name__}"):
            await check_domain(Kept(world), **arguments)
    assert world.seen == []
