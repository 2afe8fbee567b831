"""The base of all messages, and the types of their fields with their limits."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Blob", "Column", "Digest", "LoraName", "Message", "Name", "Natural", "Rank", "Seconds", "Text"]

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=16384)]
Natural = Annotated[int, Meta(ge=0, le=2**60)]
Rank = Annotated[int, Meta(ge=0, lt=2**20)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Blob = Annotated[bytes, Meta(max_length=64 * 1024)]  # an offer or a ticket
Column = Annotated[bytes, Meta(max_length=2**28)]  # packed numbers
LoraName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # part of a file's name


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages. Only types in `messages.LARGE` may use frames beyond `codec.SMALL_FRAME` bytes."""

    id: Natural = 0
