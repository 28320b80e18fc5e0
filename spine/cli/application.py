"""The user's own Spine, found by ``MODULE:ATTR``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spine.cli.support import CommandError

if TYPE_CHECKING:
    from spine.runtime import Spine


def load_spine(target: str, url: str | None = None) -> Spine:
    """Import the Spine that ``target`` names (``package.module:attribute``, or a function that makes one).

    ``url``, when given, is the database that a Spine made without one keeps its journal in.
    """
    from spine.runtime import Spine

    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise CommandError(f"--app {target!r} is not MODULE:ATTR, such as shop.app:spine")
    if url is not None:
        os.environ["SPINE_DATABASE_URL"] = url
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
    except Exception as error:
        raise CommandError(
            f"--app {target}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise CommandError(f"--app {target}: {module_name} has no {attribute}")
        found = getattr(found, name)
    made = found if isinstance(found, Spine) else found() if callable(found) else None
    if not isinstance(made, Spine):
        raise CommandError(f"--app {target}: {attribute} is neither a Spine nor a function that returns one")
    return made
