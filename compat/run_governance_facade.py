"""The predecessor's run governance facade module: the canonical objects, asked through the blocking bridge."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from compat.bridge import BRIDGE
from spine.governance.facade import RAC_ENABLED, RunGovernanceFacade

__all__ = ["RAC_ENABLED", "RunGovernanceFacade", "get_run_governance_facade"]

_FACADE: Final[RunGovernanceFacade[str | None, UUID | None]] = RunGovernanceFacade(BRIDGE.record)


def get_run_governance_facade() -> RunGovernanceFacade[str | None, UUID | None]:
    """The process's facade: each call blocks until it is recorded, and answers None where it cannot be."""
    return _FACADE
