"""Parts of a bucket that ranks of several nodes write, as runs of bytes of a slot. Imports no numpy: messages are made
of these.

Runs are packed: little-endian i64 pairs, first byte in the slot and how many; ascending, and apart.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

__all__ = ["MemberPart", "Share"]


class Share(NamedTuple):
    """What one node writes of one bucket."""

    node: int  # its place among those of the ranks, home being 0
    runs: bytes


class MemberPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one member of a communicator has of a bucket, as messages and commands say it."""

    root: Annotated[int, Meta(ge=0, lt=2**20)]  # its rank there
    runs: Annotated[bytes, Meta(max_length=2**22)]
