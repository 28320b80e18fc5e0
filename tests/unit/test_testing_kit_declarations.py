"""What is not declared as a participant is refused before anything of it is called."""

from __future__ import annotations

from typing import Any

import pytest

from spine.built_in import BUILT_INS
from spine.effects import Effect
from spine.testing import ContractViolated, check_domain
from tests.unit.kept_domain import Kept, World

pytestmark = pytest.mark.anyio


class Sync(Kept):
    def forward(self, effect: Effect) -> Any:  # type: ignore[override]
        return {}


class NoArgument(Kept):
    async def rollback(self) -> None:  # type: ignore[override]
        pass


class NoRollback(Kept):
    rollback = None  # type: ignore[assignment]


class NoTime(Kept):
    timeout_s = 0.0


@pytest.mark.parametrize(
    ("domain", "happened"),
    [
        (Kept, "pass an instance of it"),
        (Sync(World()), "must be `async def`"),
        (NoArgument(World()), "rollback cannot be called with one argument"),
        (NoRollback(World()), "RollbackNotSupportedError"),
        (NoTime(World()), "timeout_s 0.0 must be more than 0"),
        (object(), "has no name"),
        (BUILT_INS[0], "it is built in"),
    ],
)
async def test_what_cannot_take_part_is_refused_before_it_is_called(domain: object, happened: str):
    with pytest.raises(ContractViolated, match="declared") as told:
        await check_domain(domain)
    assert happened in told.value.report.violated[0].detail
