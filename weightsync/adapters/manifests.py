"""Manifests that an engine's workers have seen: a whole one is told once, and its digest from then on.

That of 19,000 tensors has 1.8 MB, which an HTTP server, its engine and each worker pass on as text. A worker remembers
more than a daemon believes it does, since several may speak to it; where it does not know a digest after all, a push
fails and the next tells the whole.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from weightsync.errors import LocalProtocolError
from weightsync.plan.manifest import Manifest
from weightsync.plan.packing import DIGEST_BYTES
from weightsync.replay.facts import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SeenManifests", "ToldManifests"]

_SEVERAL = 4  # daemons, or entries of an engine in one, that may speak to the same workers


class SeenManifests:
    """In a worker."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Manifest] = {}  # by digest, the latest last

    def of(self, told: bytes) -> Manifest:
        """The manifest that was told, whole or by its digest. Raises `CodecError`, or `LocalProtocolError` for a digest
        that says nothing here.
        """
        if len(told) == DIGEST_BYTES:
            found = self._kept.get(told)
            if found is None:
                raise LocalProtocolError(
                    "this worker does not remember that manifest", hint="the next push tells it all"
                )
        else:
            found = Manifest.unpack(told)
            found = self._kept.get(found.digest, found)
        _note(self._kept, found, LAYOUTS * _SEVERAL)
        return found


class ToldManifests:
    """In the daemon, of the workers of one engine."""

    def __init__(self) -> None:
        self._told: dict[bytes, Manifest] = {}

    def tell(self, manifest: Manifest) -> bytes:
        """What to tell the workers so that they know it."""
        told = manifest.digest in self._told
        _note(self._told, manifest, LAYOUTS)
        return manifest.digest if told else manifest.pack()

    def forget(self) -> None:
        """Nobody knows what the workers remember."""
        self._told.clear()

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """For what is told inside."""
        try:
            yield
        except BaseException:
            self.forget()
            raise


def _note(kept: dict[bytes, Manifest], manifest: Manifest, most: int) -> None:
    kept.pop(manifest.digest, None)
    kept[manifest.digest] = manifest
    for digest in list(kept)[:-most]:
        del kept[digest]
