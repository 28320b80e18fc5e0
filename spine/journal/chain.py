"""The hash chain: how one journal row is bound to all rows before it."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

STREAM: Final = "main"
GENESIS: Final = bytes(32)
_DOMAIN: Final = b"spine.journal.v1"


def chain_prefix(stream: str) -> bytes:
    """What every row of ``stream`` is hashed after: a zero byte, the domain, the name's length (4 bytes), the name."""
    name = stream.encode()
    return b"\x00" + _DOMAIN + len(name).to_bytes(4, "big") + name


MAIN_PREFIX: Final = chain_prefix(STREAM)


def row_hash(prefix: bytes, seq: int, prev: bytes, body: bytes) -> bytes:
    """SHA-256 (32 bytes) of prefix, ``seq`` (8 bytes, big endian), ``prev`` and the body as it is stored."""
    return sha256(prefix + seq.to_bytes(8, "big") + prev + body).digest()
