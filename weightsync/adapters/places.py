"""Where an engine's workers have places for what is pushed, told whole once and by a digest from then on.

The places of 19,000 tensors take some 1.7 MB for each rank, which its worker, engine and HTTP server pass on. So a
worker is asked together with the digests of what the daemon has been told before, and tells one of these where it can.
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
    """What one rank answers."""

    places: bytes = b""  # a packed `Exposure`, or the digest of one
    why_not: str = ""  # there are none

    def pack(self) -> bytes:
        """As bytes, for `ToldPlaces`."""
        return msgspec.msgpack.encode(self)


def shown(found: Exposure | str, known: Collection[bytes]) -> Shown:
    """In a worker: what to answer where the daemon knows places of these digests."""
    if isinstance(found, str):
        return Shown(why_not=found)
    return Shown(found.digest if found.digest in known else found.packed)


class ToldPlaces:
    """In the daemon, of the ranks of one engine."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._ranks: list[dict[bytes, bytes]] = []  # packed, by digest, the latest last

    @property
    def known(self) -> list[bytes]:
        """What to ask the workers with."""
        return sorted({digest for rank in self._ranks for digest in rank})

    def of(self, answers: Sequence[bytes], ranks: int) -> Exposures | str:
        """What all of so many ranks answered, in their order; or the first reason why one has no places. Raises
        `EngineError` for what is no answer.
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
        """Digest and whole of what a rank told, remembered."""
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
