"""What weightsyncd says to a keeper, and what that answers: typed MessagePack over a socket pair, one at a time.

Deadlines travel as they are: `time.monotonic()` is one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from weightsync.errors import ErrorRecord

__all__ = ["Begin", "Command", "Commit", "Finish", "Hello", "Load", "Repeat", "Reply", "Settle"]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Tell what is kept."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Open an update; forget one that is open. What is kept stays."""

    version: int
    after: int | None  # the version that was committed last, on any engine
    manifest: bytes  # as packed
    offers: tuple[bytes, ...]
    deadline: float


class Load(msgspec.Struct, frozen=True, tag=True):
    """Copy one bucket."""

    bucket: int
    ticket: bytes
    deadline: float


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Check that everything came."""


class Commit(msgspec.Struct, frozen=True, tag=True):
    """Keep this update from now on, and forget what was kept before."""


class Settle(msgspec.Struct, frozen=True, tag=True):
    """The push is over: forget an update that is still open."""

    whole: int | None  # its version, if it was committed and brought all that engines hold


class Repeat(msgspec.Struct, frozen=True, tag=True):
    """Push what is kept to these engines, and answer when they serve it."""

    engines: tuple[str, ...]
    deadline: float


Command: TypeAlias = Hello | Begin | Load | Finish | Commit | Settle | Repeat


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to any command."""

    version: int | None = None  # kept
    nbytes: int = 0  # kept
    error: ErrorRecord | None = None
