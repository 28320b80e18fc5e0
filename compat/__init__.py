"""Blocking shims for code that cannot await: a legacy worker's imports, on one handle per process.

Every shim asks through the same handle. Where its calls go is decided at each call: to what ``connect`` was given, else
to the Spine running in this process, else to one of the handle's own, started with the first call on its own thread, on
``SPINE_DATABASE_URL`` or ./spine.db, and stopped when the process ends. A forked child builds its own anew.
"""

from __future__ import annotations

from compat.bridge import BRIDGE

__all__ = ["connect", "disconnect"]

connect = BRIDGE.connect
disconnect = BRIDGE.disconnect
