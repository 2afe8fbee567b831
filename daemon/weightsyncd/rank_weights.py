"""What trainer ranks tell of their weights in a push: fingerprints, and where exposed weights lie."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import RemoteProtocolError
from weightsync.fingerprint import bucket_sum, combine
from weightsync.plan.exposure import Exposures
from weightsync.plan.packing import digest_of
from weightsync.session import events as ev
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from weightsync.session.machine import PushSession
    from weightsyncd.context import PushContext
    from weightsyncd.ranks import Ranks

__all__ = ["KnownExposures", "RankWeights"]

logger = logging.getLogger(__name__)

_KEPT = 1 << 30  # bytes: for hundreds of ranks, and for the models and layouts that alternate on one node


class KnownExposures:
    """The daemon's memory of exposures, by digest: in the second push of a layout a rank tells the digest alone."""

    def __init__(self) -> None:
        self._packed: OrderedDict[bytes | None, bytes] = OrderedDict()
        self._nbytes = 0

    def learn(self, packed: bytes) -> bytes:
        """Note a packed exposure, and return its digest."""
        digest = digest_of(packed)
        if digest not in self._packed:
            self._packed[digest] = packed
            self._nbytes += len(packed)
        self._packed.move_to_end(digest)
        while self._nbytes > _KEPT and len(self._packed) > 1:
            self._nbytes -= len(self._packed.popitem(last=False)[1])
        return digest

    def get(self, digest: bytes | None) -> bytes | None:
        """The exposure, if it is known."""
        if digest not in self._packed:
            return None
        self._packed.move_to_end(digest)
        return self._packed[digest]


class RankWeights:
    """What the ranks of one push have told of their weights."""

    def __init__(
        self,
        context: PushContext,
        session: PushSession,
        ranks: Ranks,
        known: KnownExposures,
        hear: Callable[[ev.Event], None],
    ) -> None:
        self._context, self._session, self._ranks, self._known, self._hear = context, session, ranks, known, hear
        self._exposed: dict[int, tuple[bytes, bytes]] = {}  # by rank: packed, and its digest
        self._measured: set[int] = set()

    def filled(self, rank: int, message: msg.Filled) -> None:
        """Note that a rank has written its parts of a bucket."""
        context, buckets = self._context, self._session.buckets
        sums = self._sums(rank, message)
        if sums is None:
            return
        if not 0 <= message.bucket < len(buckets):
            self._confused(rank, f"there is no bucket {message.bucket}")
            return
        if rank in buckets[message.bucket].unfilled:  # a duplicate must not count twice
            assert context.expected is not None, "there are buckets"
            np.add.at(context.expected, *sums)
            context.sums[message.bucket] = combine((context.sums.get(message.bucket, 0), bucket_sum(*sums)))
        self._hear(ev.RankFilled(rank=rank, bucket=message.bucket, nbytes=message.nbytes))

    def exposed(self, rank: int, message: msg.Exposed) -> None:
        """Note where a rank's weights lie, or why no other process can read them there."""
        model, version = self._context.model, self._context.version
        if message.problem:
            words = (model, version, rank, message.problem)
            logger.warning(
                "[model=%s v=%d] rank %d cannot expose its weights, slots are used: %s", *words, extra={"rank": rank}
            )
        else:
            if message.exposure is not None and self._known.learn(message.exposure) != message.digest:
                self._confused(rank, "its exposure has another digest than it says")
                return
            packed = message.exposure or self._known.get(message.digest)
            if packed is None or message.digest is None:
                self._ranks.tell(rank, msg.AskExposure())
                return
            self._exposed[rank] = packed, message.digest
            if len(self._exposed) == self._ranks.world:
                both = [self._exposed[r] for r in range(self._ranks.world)]
                self._context.exposures = Exposures(*(tuple(column) for column in zip(*both, strict=True)))
        self._hear(ev.RankExposed(rank=rank, problem=message.problem))

    def measured(self, rank: int, message: msg.Measured) -> None:
        """Note the fingerprints of what a rank exposes."""
        sums = self._sums(rank, message)
        if sums is None:
            return
        if rank not in self._measured:
            self._measured.add(rank)
            assert self._context.measured is not None, "there are tensors"
            np.add.at(self._context.measured, *sums)
        self._hear(ev.RankMeasured(rank=rank, nbytes=message.nbytes))

    def _sums(
        self, rank: int, message: msg.Filled | msg.Measured
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]] | None:
        """Return tensor numbers and their fingerprints. If they make no sense, fail the rank and return None."""
        expected = self._context.expected
        tensors = np.frombuffer(message.tensors, dtype="<u4") if len(message.tensors) % 4 == 0 else None
        sums = np.frombuffer(message.fingerprints, dtype="<u8") if len(message.fingerprints) % 8 == 0 else None
        if expected is None or tensors is None or sums is None or len(tensors) != len(sums):
            self._confused(rank, "its fingerprints are malformed")
            return None
        if len(tensors) and int(tensors.max()) >= len(expected):
            self._confused(rank, "it names a tensor that is not in the manifest")
            return None
        return tensors, sums

    def _confused(self, rank: int, why: str) -> None:
        error = RemoteProtocolError(f"rank {rank} sent a message that makes no sense here: {why}", rank=rank)
        self._hear(ev.RankFailed(rank=rank, error=error.record()))
