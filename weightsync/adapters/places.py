"""The places that an engine's workers show to the daemon: whole the first time, and by digest from then on.

The places of 19,000 tensors take some 1.7 MB for each rank, which its worker, engine and HTTP server pass on. So the
daemon's question has the digests of the places it knows, and a worker whose places are among them answers the digest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import EngineError
from weightsync.plan.exposure import Exposures
from weightsync.plan.packing import DIGEST_BYTES, digest_of
from weightsync.plan.replay_facts import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from weightsync.plan.exposure import Exposure

__all__ = ["Shown", "ToldPlaces", "shown"]


class Shown(msgspec.Struct, frozen=True, omit_defaults=True):
    """One rank's answer."""

    places: bytes = b""  # a packed `Exposure`, or the digest of one
    why_not: str = ""  # why the rank has no places

    def pack(self) -> bytes:
        """Encode it for `ToldPlaces`."""
        return msgspec.msgpack.encode(self)


def shown(found: Exposure | str, known: Collection[bytes]) -> Shown:
    """In a worker: make the answer to a daemon that knows the places with the digests `known`."""
    if isinstance(found, str):
        return Shown(why_not=found)
    return Shown(found.digest if found.digest in known else found.packed)


class ToldPlaces:
    """Remembers, in the daemon, the places that the ranks of one engine have shown."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._ranks: list[dict[bytes, bytes]] = []  # for each rank: digest → packed `Exposure`, the latest last

    @property
    def known(self) -> list[bytes]:
        """Digests to send along with the question to the workers."""
        return sorted({digest for rank in self._ranks for digest in rank})

    def of(self, answers: Sequence[bytes], ranks: int) -> Exposures | str:
        """Combine the answers of `ranks` ranks, in their order; or return the first reason why a rank has no places.

        Raises `EngineError` if answers are missing or malformed.
        """
        if len(answers) != ranks:
            raise self._wrong(
                f"{len(answers)} of the {ranks} tp ranks of engine {self._engine} say where they have places"
            )
        told = [self._unpacked(rank, answer) for rank, answer in enumerate(answers)]
        why_not = next((f"tp rank {rank}: {one.why_not}" for rank, one in enumerate(told) if one.why_not), "")
        if why_not:
            return why_not
        self._ranks += [{} for _ in told[len(self._ranks) :]]
        found = [self._noted(rank, one.places) for rank, one in enumerate(told)]
        return Exposures(tuple(packed for _, packed in found), tuple(digest for digest, _ in found))

    def _unpacked(self, rank: int, answer: bytes) -> Shown:
        try:
            return msgspec.msgpack.decode(answer, type=Shown)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            what = f"tp rank {rank} of engine {self._engine} answered in a way that is none of ours: {error}"
            raise self._wrong(what) from error

    def _noted(self, rank: int, places: bytes) -> tuple[bytes, bytes]:
        """Remember a rank's places, and return their digest and their packed form."""
        kept = self._ranks[rank]
        if len(places) != DIGEST_BYTES:
            digest, whole = digest_of(places), places
        elif places in kept:
            digest, whole = places, kept.pop(places)
        else:
            who = f"tp rank {rank} of engine {self._engine}"
            raise self._wrong(f"{who} speaks of places that it never told: {places.hex()}")
        kept.pop(digest, None)
        kept[digest] = whole
        while len(kept) > LAYOUTS:
            del kept[next(iter(kept))]
        return digest, whole

    def _wrong(self, what: str) -> EngineError:
        return EngineError(what, engine=self._engine, phase="places")
