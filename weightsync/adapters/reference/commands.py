"""The front process's commands to its workers: typed MessagePack, length-prefixed, over a socket pair. No pickle.

Every worker gets the same commands in the same order, and answers each with one `Reply`. Deadlines are sent as they
are: `time.monotonic()` is one clock for all processes of a machine.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

__all__ = [
    "MANIFESTS_KEPT",
    "Accept",
    "Begin",
    "Checksums",
    "Command",
    "Draw",
    "Fingerprints",
    "Finish",
    "Load",
    "Places",
    "Reply",
    "Residents",
    "Step",
]

MANIFESTS_KEPT = 8  # newest accepted manifests that front and workers remember; both forget at the same count


class Accept(msgspec.Struct, frozen=True, tag=True):
    """Plan the loading of a manifest, and remember it by its digest."""

    manifest: bytes  # as packed


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Open an update, dropping one that is open."""

    digest: bytes  # of an accepted manifest
    offers: tuple[bytes, ...]  # this rank's
    deadline: float


class Draw(msgspec.Struct, frozen=True, tag=True):
    """Take this rank's slices out of the memory that a trainer's ranks expose. Answers why it cannot, or nothing."""

    exposures: bytes  # packed, or the digest of exposures that were sent before
    deadline: float


class Places(msgspec.Struct, frozen=True, tag=True):
    """Show where bridges may write this rank's slices. Answers packed `Shown`."""

    known: tuple[bytes, ...]  # digests of places that the daemon knows


class Load(msgspec.Struct, frozen=True, tag=True):
    """Take this rank's slices out of one bucket."""

    bucket: int
    ticket: bytes  # this rank's
    deadline: float


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Check that every piece was loaded, wait for copies under way, end the update, and drop all caches."""

    deadline: float


class Residents(msgspec.Struct, frozen=True, tag=True):
    """Tell which boxes of an accepted manifest's tensors this rank holds. Answers packed `ResidentBoxes`."""

    digest: bytes


class Fingerprints(msgspec.Struct, frozen=True, tag=True):
    """Fingerprint the boxes of `Residents` in the parameters. Answers 8 bytes for each, little-endian, in order."""

    digest: bytes


class Checksums(msgspec.Struct, frozen=True, tag=True):
    """Compute xxh3 over all parameters in order. Answers 8 bytes, big-endian."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """Decode one token of a sequence."""

    sequence: int
    start: int  # position of the first of `tokens`; earlier positions are cached, and 0 drops the cache
    tokens: tuple[int, ...]
    ended: tuple[int, ...] = ()  # sequences whose caches are dropped first
    draw: float | None = None  # in [0, 1): take the token at this point of the distribution; None: the likeliest


Command: TypeAlias = Accept | Begin | Draw | Places | Load | Finish | Residents | Fingerprints | Checksums | Step


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's answer: an HTTP status, an error's text, and the result."""

    status: int = 200
    error: str = ""
    data: bytes = b""
    token: int = 0
    logprob: float = 0.0
