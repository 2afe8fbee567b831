"""Commands of weightsyncd to a keeper, and the keeper's reply: typed MessagePack over a socket pair, one at a time.

Deadlines are values of `time.monotonic()`, which is one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from weightsync.errors import ErrorRecord

__all__ = ["Begin", "Command", "Commit", "Finish", "Hello", "Load", "Repeat", "Reply", "Settle"]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Ask which version is kept."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Open an update, and forget one that is open. The kept version stays."""

    version: int
    after: int | None  # the version that was committed last, on any engine
    manifest: bytes  # packed
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
    """Keep this update from now on, and forget the version kept before."""


class Settle(msgspec.Struct, frozen=True, tag=True):
    """The push is over: forget an update that is still open."""

    whole: int | None  # the push's version, if it was committed and brought all that engines hold


class Repeat(msgspec.Struct, frozen=True, tag=True):
    """Push the kept version to these engines, and answer when they serve it."""

    engines: tuple[str, ...]
    deadline: float


Command: TypeAlias = Hello | Begin | Load | Finish | Commit | Settle | Repeat


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to any command."""

    version: int | None = None  # the one kept, if it is whole
    nbytes: int = 0  # of that version
    error: ErrorRecord | None = None
