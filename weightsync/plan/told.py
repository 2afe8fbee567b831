"""Manifests and exposures that an engine's workers, or a bridge, have seen: told whole once, then by their digest.

The manifest of 19,000 tensors has 1.8 MB, which an HTTP server, its engine and each worker pass on as text. A worker
remembers more than each daemon believes it does, because several daemons may speak to it. If it does not know a digest
after all, the push fails and the next one tells everything whole.
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

_SEVERAL = 4  # daemons, or entries for an engine within one daemon, that may speak to the same workers


class _Packs(Protocol):
    """An object that can be told."""

    @property
    def digest(self) -> bytes:
        """16 bytes that tell it from any other."""

    def pack(self) -> bytes:
        """The whole object as bytes."""


T = TypeVar("T", bound=_Packs)


class _Seen(Generic[T]):
    """What a worker or a bridge remembers of the objects that it was told: the latest `most`."""

    def __init__(self, what: str, unpack: Callable[[bytes], T], most: int) -> None:
        self._what, self._unpack, self._most = what, unpack, most
        self._kept: dict[bytes, T] = {}  # by digest, the latest last

    def of(self, told: bytes) -> T:
        """Return the object that was told, whole or by its digest.

        Raises `CodecError`, or `LocalProtocolError` for a digest that is not known here.
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
    """The manifests that a worker, or a bridge, has seen. A bridge needs only `LAYOUTS`: one daemon speaks to it."""

    def __init__(self, most: int = LAYOUTS * _SEVERAL) -> None:
        super().__init__("manifest", Manifest.unpack, most)


class SeenExposures(_Seen[Exposures]):
    """The exposures that a worker, or a bridge, has seen; see `SeenManifests`."""

    def __init__(self, most: int = LAYOUTS * _SEVERAL) -> None:
        super().__init__("exposure", Exposures.unpack, most)


class _Told(Generic[T]):
    """What a daemon has told the workers of one engine, or one bridge."""

    def __init__(self) -> None:
        self._told: dict[bytes, T] = {}

    def tell(self, one: T) -> bytes:
        """Return the bytes to send: the digest if the workers have been told this object, else the whole."""
        told = one.digest in self._told
        _note(self._told, one, LAYOUTS)
        return one.digest if told else one.pack()

    def forget(self) -> None:
        """Tell each object whole the next time, because it is not known what the workers remember."""
        self._told.clear()

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Forget everything if the body, which sends what was told, fails."""
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
