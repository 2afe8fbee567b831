"""Compare the memory of an engine that has our plugin with what the trainer sent, as far as its load plans tell.

Each worker reports fingerprints of the boxes of pushed tensors that it holds (`weightsync/replay/residents.py`). The
boxes themselves are asked for once; from then on the worker reports their digest.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Protocol

import msgspec
from msgspec import Meta

from weightsync.adapters.verify import Verifier
from weightsync.errors import CodecError, EngineError
from weightsync.plan.packing import digest_of
from weightsync.plan.replay_facts import LAYOUTS
from weightsync.plan.residents import ResidentBoxes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightsync.plan.boxes import Words
    from weightsync.plan.manifest import Manifest
    from weightsync.replay.model import ModelState
    from weightsync.replay.state import ModelReplay

_HINT = (
    "weights that the trainer changed while they were read, a slot that was damaged under way, or something else that "
    "writes into the engine's weights; the next push goes through its loader, and is checked bucket by bucket"
)
__all__ = ["HeldCheck", "HeldSums", "Workers", "packed_boxes", "sums_of"]


class HeldSums(msgspec.Struct, frozen=True):
    """One worker's report of what it holds. `boxes` is the digest of its packed boxes; b"" if it cannot tell."""

    boxes: Annotated[bytes, Meta(max_length=16)] = b""
    sums: bytes = b""  # little-endian uint64, one for each box
    pulled: int = 0  # buckets of the push that it loaded without checking them


def sums_of(replay: ModelReplay | None, digest: bytes, model: ModelState) -> HeldSums:
    """In a worker: report what `model` holds of the push that has ended; `digest` is of its manifest."""
    if replay is None:
        return HeldSums()
    held = replay.residents(digest, model)
    sums = replay.fingerprints(held, model) if held is not None else None
    if held is None or sums is None:
        return HeldSums(pulled=replay.pulled)
    return HeldSums(boxes=digest_of(held.packed), sums=sums, pulled=replay.pulled)


def packed_boxes(replay: ModelReplay | None, digest: bytes, model: ModelState) -> bytes:
    """In a worker: return the boxes behind `sums_of`, as packed `ResidentBoxes`; b"" if it cannot tell."""
    held = replay.residents(digest, model) if replay is not None else None
    return held.packed if held is not None else b""


class Workers(Protocol):
    """The workers of an engine that has our plugin."""

    async def sums(self, manifest: Manifest, *, deadline: float) -> Sequence[HeldSums]:
        """Ask every worker what it holds of the push that has ended; answers are in the order of ranks."""

    async def boxes(self, manifest: Manifest, *, deadline: float) -> Sequence[bytes]:
        """Ask every worker for the boxes behind its `sums`, as packed `ResidentBoxes`."""


class HeldCheck:
    """Compares, in the daemon, what one engine's workers hold with what was pushed."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._verifiers: dict[tuple[bytes, ...], Verifier] = {}  # the latest, by digests of manifest and ranks' boxes
        self.doubtful = False  # the last comparison failed, perhaps because the workers' load plans are wrong
        self._whole: set[bytes] = set()  # digests of manifests whose last push compared all tensors, and all were equal

    def covers(self, manifest: Manifest) -> bool:
        """Whether all tensors of this manifest were compared, and equal, after its last push.

        If so, workers may read only the bytes they need: the comparison after the push finds whatever they read wrong.
        """
        return manifest.digest in self._whole

    def forget(self, manifest: Manifest) -> None:
        """Have this manifest's next push checked bucket by bucket, because the last one was not compared."""
        self._whole.discard(manifest.digest)

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Wrap an unchecked read: if it fails, the next push of any layout is checked bucket by bucket."""
        try:
            yield
        except BaseException:
            self._whole.clear()
            raise

    async def verify(
        self, workers: Workers, manifest: Manifest, expected: Words, *, drawn: bool = False, deadline: float
    ) -> int | None:
        """Compare what the workers hold, and return how many tensors were compared; None if the workers cannot tell.

        `drawn`: the push came without buckets, so nothing of it was checked, whatever the workers report. Raises
        `EngineError` naming the first tensor that differs, or if weights that came unchecked cannot all be compared.
        """
        self.forget(manifest)
        self.doubtful = False
        told = await workers.sums(manifest, deadline=deadline)
        pulled = drawn or any(one.pulled for one in told)
        if not told or not all(one.boxes for one in told):
            if pulled:
                raise self._uncompared("a worker cannot tell what lies in its memory")
            return None
        key = (manifest.digest, *(one.boxes for one in told))
        verifier = self._verifiers.pop(key, None)
        if verifier is None:
            packed = await workers.boxes(manifest, deadline=deadline)
            if [digest_of(one) for one in packed] != [one.boxes for one in told]:
                raise EngineError(
                    f"the workers of {self._engine} contradict themselves about what they hold",
                    engine=self._engine,
                    phase="verify",
                )
            try:
                ranks = [ResidentBoxes.unpack(one, manifest.tensors) for one in packed]
            except CodecError as error:
                raise EngineError(
                    f"what the workers of {self._engine} say they hold cannot be read: {error.message}",
                    engine=self._engine,
                    phase="verify",
                ) from error
            verifier = Verifier(ranks, manifest.tensors, parts=True)
        self._verifiers[key] = verifier
        while len(self._verifiers) > LAYOUTS:
            forgotten = next(iter(self._verifiers))
            del self._verifiers[forgotten]
            self._whole.discard(forgotten[0])
        try:
            compared = verifier.compare([one.sums for one in told], expected)
        except EngineError as error:
            self.doubtful = True
            raise EngineError(error.message, engine=self._engine, phase="verify", hint=error.hint or _HINT) from error
        if compared == len(manifest.tensors):
            self._whole.add(manifest.digest)
        elif pulled:
            raise self._uncompared(f"{compared} of {len(manifest.tensors)} tensors can be compared in its memory")
        return compared

    def _uncompared(self, why: str) -> EngineError:
        return EngineError(
            f"engine {self._engine} pulled its weights unchecked, because after the last push all could be compared, "
            f"and now {why}",
            engine=self._engine,
            phase="verify",
            hint="the next push is read and checked bucket by bucket",
        )
