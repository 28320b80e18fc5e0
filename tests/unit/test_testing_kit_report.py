"""The check's report and its errors can be read, and say what to do."""

from __future__ import annotations

import asyncio
import math
import pickle
from typing import Any

import pytest

from spine.effects import Effect
from spine.kernel.errors import ConfigurationError, SpineError
from spine.testing import ContractViolated, check_domain
from tests.unit.broken_domains import NoWordForTombstones
from tests.unit.kept_domain import Kept, World, report_of

pytestmark = pytest.mark.anyio


async def test_several_defects_are_told_at_once_with_what_to_do():
    class Bad(NoWordForTombstones):
        def apply(self, effect: Effect) -> Any:
            super().apply(effect)
            return {"cents": math.inf}

    with pytest.raises(ContractViolated) as told:
        await report_of(Bad)
    text = str(told.value)
    assert text.startswith("the participant contract of domain 'kept' (EXTERNAL), seed s: 2 violated, 0 not checked, ")
    assert "violated: recordable: what forward returns is a mapping of JSON, or None" in text
    assert "violated: tombstoned: status says tombstoned after a rollback" in text
    assert text.count("what happened: ") == text.count("what to do: ") == 2
    assert isinstance(told.value, SpineError)


def test_the_error_survives_pickling():
    with pytest.raises(ContractViolated) as told:
        asyncio.run(check_domain(object()))
    again = pickle.loads(pickle.dumps(told.value))
    assert (str(again), again.report) == (str(told.value), told.value.report)


async def test_the_report_reads_as_a_list():
    lines = str(await report_of(Kept, refused=None)).splitlines()
    assert lines[0].endswith("0 violated, 1 not checked, 21 passed:")
    assert lines[1].startswith("  not checked: refusal: ")
    assert lines[2].startswith("    because: no completion is known that the domain refuses")
    assert lines[3].startswith("  passed: declared: ")


async def test_a_probe_that_fails_is_the_checks_own_fault():
    async def live(effect: Effect) -> int:
        raise LookupError("no such table")

    with pytest.raises(ConfigurationError, match=r"live= failed for effect .*no such table"):
        await check_domain(Kept(World()), live=live)
