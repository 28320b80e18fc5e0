"""Switches read once from the environment, with a value that is not understood refused instead of guessed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from spine.kernel.errors import ConfigurationError

_TRUE: Final = frozenset({"true", "1", "yes", "on"})
_FALSE: Final = frozenset({"false", "0", "no", "off"})


def flag(name: str, *, default: bool, environ: Mapping[str, str] | None = None) -> bool:
    """The switch ``name``; unset or empty gives ``default``. Raises ConfigurationError on any other word."""
    text = (os.environ if environ is None else environ).get(name, "").strip().lower()
    if not text:
        return default
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigurationError(
        f"environment variable {name} is {text!r}: set it to true or false (also 1/0, yes/no, on/off), or unset it "
        f"for the default {str(default).lower()}"
    )


RAC_ENABLED: Final = flag("RAC_ENABLED", default=True)
RAC_ROLLBACK_AUDIT_ENABLED: Final = flag("RAC_ROLLBACK_AUDIT_ENABLED", default=True)
TRANSACTION_COORDINATOR_ENABLED: Final = flag("TRANSACTION_COORDINATOR_ENABLED", default=True)
