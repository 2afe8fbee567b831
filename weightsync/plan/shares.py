"""The runs of a bucket that the ranks of each node write, as messages carry them. So it imports no numpy.

Runs are packed as pairs of little-endian i64: first byte in the slot, number of bytes. They ascend and do not touch.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

__all__ = ["MemberPart", "Share"]


class Share(NamedTuple):
    """What one node writes of one bucket."""

    node: int  # index among the nodes that have ranks; home is 0
    runs: bytes


class MemberPart(msgspec.Struct, frozen=True, kw_only=True):
    """What one member of a communicator has of a bucket, as messages and commands carry it."""

    root: Annotated[int, Meta(ge=0, lt=2**20)]  # the member's rank in the communicator
    runs: Annotated[bytes, Meta(max_length=2**22)]
