"""Whether ``actors`` and ``compat`` are this distribution's: others own packages of these names too."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import sys
from pathlib import Path

from spine.kernel.errors import ConfigurationError

DISTRIBUTION = "hoc-spine"
PACKAGES = ("actors", "compat")


def check_install() -> None:
    """Raise ``ConfigurationError`` unless ``actors`` and ``compat`` resolve to the folders beside ``spine``.

    Nothing is imported: a foreign package's code does not run.
    """
    root = Path(__file__).resolve().parent.parent
    recorded = _recorded_hashes(root)
    for name in PACKAGES:
        ours = root / name
        found = _find(name)
        if found is None:
            raise ConfigurationError(
                f"package {name!r} of {DISTRIBUTION} is missing: it should be {ours}. "
                f"Install {DISTRIBUTION} again, with pip's --force-reinstall"
            )
        if found != ours:
            raise ConfigurationError(
                f"package {name!r} resolves to {found}, which is not {DISTRIBUTION}'s ({ours}). "
                f"Rename that package, or start the program so that {root} comes before {found.parent} on sys.path; "
                f"if another distribution installed it, uninstall that one"
            )
        entry = ours / "__init__.py"
        expected = recorded.get(f"{name}/__init__.py")
        if expected is not None and _digest(entry) != expected:
            raise ConfigurationError(
                f"{entry} is not the file that {DISTRIBUTION} installed: another distribution with a package {name!r} "
                f"wrote over it. Uninstall that one, then install {DISTRIBUTION} again, with pip's --force-reinstall"
            )


def _find(name: str) -> Path | None:
    """The folder that ``import name`` takes, or ``None``; a single-file module counts as its file."""
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def _recorded_hashes(root: Path) -> dict[str, str]:
    """The installer's own list of this distribution's files and digests; empty for a source tree."""
    for record in root.glob(f"{DISTRIBUTION.replace('-', '_')}-*.dist-info/RECORD"):
        with record.open(newline="", encoding="utf-8") as file:
            return {row[0]: row[1] for row in csv.reader(file) if len(row) > 1 and row[1].startswith("sha256=")}
    return {}


def _digest(path: Path) -> str:
    """The digest in the notation of RECORD; empty when the file cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
