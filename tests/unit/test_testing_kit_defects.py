"""Each defect of an EXTERNAL domain is found, by the name of its clause."""

from __future__ import annotations

from typing import Any

import pytest

from spine.effects import ABSENT, APPLIED, TOMBSTONED, Effect
from spine.testing import ContractViolated
from tests.unit.broken_domains import BROKEN, AlwaysApplied, FinishesAlone
from tests.unit.kept_domain import EVERY, Kept, names, report_of, violated

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("kind", "clause", "happened"), BROKEN, ids=[kind.__name__ for kind, *_ in BROKEN])
async def test_a_defect_is_named_by_its_clause_alone(kind: Any, clause: str, happened: str):
    found = await violated(kind)
    assert list(found) == [clause], found
    assert happened in found[clause]


def test_every_clause_has_a_domain_that_breaks_it():
    elsewhere = {"declared", "settled"}
    assert {clause for _, clause, _ in BROKEN} | elsewhere == set(EVERY)


async def test_what_comes_back_after_its_rollback_is_found_at_the_end():
    class FinishesLater(FinishesAlone):
        later = 4

    assert list(await violated(FinishesLater)) == ["settled"]


async def test_a_process_that_stood_still_for_the_whole_check_is_refused_too():
    """Tombstones that are kept for a while only do not outlast it."""

    class Forgets(Kept):
        def undo(self, effect: Effect) -> None:
            super().undo(effect)
            lasting = self.world.__dict__.setdefault("lasting", [])
            lasting.append(effect.id)
            if len(lasting) > 5:
                self.world.tombs.discard(lasting.pop(0))

    assert list(await violated(Forgets)) == ["settled"]


async def test_a_status_that_lies_is_caught_by_the_probe():
    class Hopeful(Kept):
        def apply(self, effect: Effect) -> Any:
            return {"queued": True}

        def says(self, effect: Effect) -> Any:
            met = [one for what, one in self.world.seen if what == "forward"]
            return TOMBSTONED if effect.id in self.world.tombs else APPLIED if effect.id in met else ABSENT

    found = await violated(Hopeful)
    assert "after forward had answered, it is to be live, but live= counts 0" in found["status"]


async def test_a_status_that_is_found_to_lie_is_not_believed_elsewhere():
    with pytest.raises(ContractViolated) as told:
        await report_of(AlwaysApplied, live=None)
    report = told.value.report
    assert names(report.violated) == ["status"]
    assert "rollback" in names(report.unchecked)
