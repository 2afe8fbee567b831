"""What an engine's workers, or a bridge, have seen: manifests, and what trainers expose. Each is told whole once, and
by its digest from then on.

The manifest of 19,000 tensors has 1.8 MB, which an HTTP server, its engine and each worker pass on as text. A worker
remembers more than a daemon believes it does, since several may speak to it; where it does not know a digest after all,
a push fails and the next tells the whole.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from weightsync.errors import LocalProtocolError
from weightsync.plan.exposure import Exposures
from weightsync.plan.manifest import Manifest
from weightsync.plan.packing import DIGEST_BYTES
from weightsync.plan.replay_facts import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SeenExposures", "SeenManifests", "ToldExposures", "ToldManifests"]

_SEVERAL = 4  # daemons, or entries of an engine in one, that may speak to the same workers


class _Packs(Protocol):
    """What is told."""

    @property
    def digest(self) -> bytes:
        """16 bytes."""

    def pack(self) -> bytes:
        """The whole."""


T = TypeVar("T", bound=_Packs)


class _Seen(Generic[T]):
    """In a worker."""

    def __init__(self, what: str, unpack: Callable[[bytes], T], most: int) -> None:
        self._what, self._unpack, self._most = what, unpack, most
        self._kept: dict[bytes, T] = {}  # by digest, the latest last

    def of(self, told: bytes) -> T:
        """What was told, whole or by its digest. Raises `CodecError`, or `LocalProtocolError` for a digest that says
        nothing here.
        """
        if len(told) == DIGEST_BYTES:
            found = self._kept.get(told)
            if found is None:
                raise LocalProtocolError(
                    f"process {os.getpid()} does not remember that {self._what}", hint="the next push tells it all"
                )
        else:
            found = self._unpack(told)
            found = self._kept.get(found.digest, found)
        _note(self._kept, found, self._most)
        return found


class SeenManifests(_Seen[Manifest]):
    """In a worker, or a bridge, which one daemon alone speaks to."""

    def __init__(self, most: int = LAYOUTS * _SEVERAL) -> None:
        super().__init__("manifest", Manifest.unpack, most)


class SeenExposures(_Seen[Exposures]):
    """Likewise."""

    def __init__(self, most: int = LAYOUTS * _SEVERAL) -> None:
        super().__init__("exposure", Exposures.unpack, most)


class _Told(Generic[T]):
    """In the daemon, of the workers of one engine, or of one bridge."""

    def __init__(self) -> None:
        self._told: dict[bytes, T] = {}

    def tell(self, one: T) -> bytes:
        """What to tell the workers so that they know it."""
        told = one.digest in self._told
        _note(self._told, one, LAYOUTS)
        return one.digest if told else one.pack()

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


class ToldManifests(_Told[Manifest]):
    """See the base class."""


class ToldExposures(_Told[Exposures]):
    """See the base class."""


def _note(kept: dict[bytes, T], one: T, most: int) -> None:
    kept.pop(one.digest, None)
    kept[one.digest] = one
    for digest in list(kept)[:-most]:
        del kept[digest]
