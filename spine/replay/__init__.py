"""Recorded runs, sent line by line through a running Spine."""

from __future__ import annotations

from spine.replay.driver import Replay
from spine.replay.lines import BadLine, Line, NumberedLine, parse, read_lines

__all__ = ["BadLine", "Line", "NumberedLine", "Replay", "parse", "read_lines"]
