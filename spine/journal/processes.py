"""Which process this is, which others are known to live or not, and which files a fork inherited from its parent."""

from __future__ import annotations

import os
from pathlib import Path

from spine.kernel.errors import JournalUnavailable

# SQLite keeps its locks in one table a process; these two mirror what a fork does to that table.
_OPEN: dict[str, list[None]] = {}
_INHERITED: dict[str, int] = {}


def this_process() -> str:
    """A name of this process that no other has, on this machine since its boot; empty where that is not known."""
    return _name(os.getpid())


def lives(process: str | None) -> bool | None:
    """Whether ``process`` runs; ``None`` when it is of another machine or process namespace and nobody here knows."""
    here = this_process()
    if not process or not here:
        return None
    place, _, rest = process.partition("/")
    pid = rest.partition("/")[0]
    if place != here.partition("/")[0] or not pid.isdigit():
        return None
    return _name(int(pid)) == process


def _name(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    try:
        # The name in brackets may hold anything, so what follows the last bracket is counted: field 22 is the start.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        state, started = fields[0], fields[19].decode("ascii")
    except (OSError, IndexError):
        return "gone"
    if state in (b"Z", b"X"):
        # It has ended, only its parent has not asked yet.
        return "gone"
    return f"{boot} {namespace}/{pid}/{started}"


def opened(path: Path) -> None:
    """Note that this process opens the SQLite file ``path``; raises JournalUnavailable for one its parent had open."""
    name = os.path.realpath(path)
    if name in _INHERITED:
        raise JournalUnavailable(
            f"process {os.getpid()} was forked from {_INHERITED[name]}, which had {name} open: SQLite would lose "
            "commits made beside inherited connections; fork before the Spine starts, start a new process, or use "
            "PostgreSQL"
        )
    # Each step is atomic: several threads open and close.
    _OPEN.setdefault(name, []).append(None)


def closed(path: Path) -> None:
    """Note that one opening of ``path`` is over."""
    openings = _OPEN.get(os.path.realpath(path))
    if openings:
        openings.pop()


def _forked() -> None:
    _INHERITED.update((name, os.getppid()) for name, openings in _OPEN.items() if openings)
    _OPEN.clear()


os.register_at_fork(after_in_child=_forked)
