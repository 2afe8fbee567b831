"""The reading side, inside a worker: slices out of bucket slots straight into the parameters, without torch.

A manifest is turned into a loading plan once, when it is accepted: for every bucket the boxes this rank needs of it,
each with its place in the slot and a writable view of its place in a parameter. Loading a bucket then is one `copyto`
per box (two microseconds, plus the bytes). What was loaded is judged by what lies in the parameters, never by the slot.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from weightsync.adapters.base import Resident
from weightsync.adapters.reference.admission import held_names
from weightsync.adapters.reference.commands import MANIFESTS_KEPT
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from weightsync.adapters.reference.config import ModelConfig
    from weightsync.adapters.reference.sharding import RankLayout, Slice
    from weightsync.plan.manifest import Manifest
    from weightsync.transports.base import BucketReceiver

__all__ = ["BucketLoader"]


class _Copy(NamedTuple):
    """One box: from a slot into a parameter."""

    target: np.ndarray[Any, Any]  # view of a parameter, unsigned integers of the element's size
    offset: int  # bytes into the slot
    strides: tuple[int, ...]  # bytes


class _Plan(NamedTuple):
    manifest: Manifest
    copies: tuple[tuple[_Copy, ...], ...]  # per bucket
    names: dict[str, str]  # pushed name → held name


class _Update:
    """An update under way: which pieces were loaded."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.loaded = np.zeros(plan.manifest.pieces, dtype=np.bool_)


class BucketLoader:
    """Loads pushes into one rank's parameters.

    `arrays` are the parameters' own memory by name, as unsigned integers of the element's size; they must stay where
    they are. `receiver` is the reading end of a transport; it is closed with this loader.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: RankLayout,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        tp_rank: int,
        receiver: BucketReceiver,
    ) -> None:
        self._config = config
        self._layout = layout
        self._shapes = checkpoint_tensors(config)
        self._arrays = arrays
        self._tp_rank = tp_rank
        self._receiver = receiver
        self._plans: dict[bytes, _Plan] = {}
        self._update: _Update | None = None
        self._latest: _Plan | None = None

    def accept(self, manifest: Manifest) -> None:
        """Plan its loading, and keep the plan until `MANIFESTS_KEPT` others were accepted."""
        self._plans.pop(manifest.digest, None)
        self._plans[manifest.digest] = self._plan(manifest)
        while len(self._plans) > MANIFESTS_KEPT:
            del self._plans[next(iter(self._plans))]

    def begin(self, digest: bytes, offers: Sequence[bytes], *, deadline: float) -> None:
        """Open an update by an accepted manifest, dropping one that is open, and attach to the arenas on offer."""
        plan = self._plans.get(digest)
        if plan is None:
            raise LocalProtocolError(f"manifest {digest.hex()} was not accepted")
        self._update = None
        for offer in offers:
            self._receiver.accept(offer, deadline=deadline)
        self._update = _Update(plan)
        self._latest = plan

    def load(self, bucket: int, ticket: bytes, *, deadline: float) -> None:
        """Copy this rank's boxes out of one bucket. Each bucket of an update is loaded once."""
        update = self._update
        if update is None:
            raise LocalProtocolError("no update is open", hint="begin first")
        manifest = update.plan.manifest
        if not 0 <= bucket < manifest.buckets:
            raise LocalProtocolError(f"the manifest has buckets 0 to {manifest.buckets - 1}", bucket=bucket)
        pieces = slice(int(manifest.bucket_first[bucket]), int(manifest.bucket_first[bucket + 1]))
        if update.loaded[pieces].any():
            raise LocalProtocolError("the bucket was loaded before", bucket=bucket)
        with self._receiver.receive(ticket, deadline=deadline) as lease:
            expected = int(manifest.bucket_nbytes[bucket])
            if lease.nbytes != expected:
                raise TransportBroken(
                    f"the bucket has {lease.nbytes} bytes, its manifest says {expected}", bucket=bucket
                )
            _copy(update.plan.copies[bucket], lease.view)
        update.loaded[pieces] = True

    def finish(self) -> None:
        """End the update. Raises `LocalProtocolError` naming the first tensor of which a piece was not loaded."""
        update = self._update
        if update is None:
            raise LocalProtocolError("no update is open", hint="begin first")
        if not update.loaded.all():
            manifest = update.plan.manifest
            piece = int(np.argmin(update.loaded))
            name = manifest.tensors.names[int(manifest.piece_tensor[piece])]
            missing = int(update.loaded.size - np.count_nonzero(update.loaded))
            raise LocalProtocolError(
                f"tensor {name!r} was not loaded (whole); {missing} of {manifest.pieces} pieces are missing",
                bucket=int(manifest.piece_bucket[piece]),
            )
        self._update = None

    def residents(self, everything: bool = False) -> list[Resident]:
        """Fingerprints of the parameters: of the latest update's tensors, or of all if there was none, or if asked."""
        if everything or self._latest is None:
            names: Iterable[tuple[str, str]] = ((name, name) for name in self._layout.slices)
        else:
            names = self._latest.names.items()
        boxes = [(pushed, box) for pushed, held in names for box in self._layout.slices.get(held, ())]
        # nothing else runs while an engine is verified, and numpy lets go of the GIL: use the cores there are
        cores = min(8, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(cores) as pool:
            groups = pool.map(lambda first: [self._resident(*held) for held in boxes[first::cores]], range(cores))
            return [resident for group in groups for resident in group]

    def close(self) -> None:
        """Detach from every arena."""
        self._update = None
        self._receiver.close()

    def _resident(self, name: str, box: Slice) -> Resident:
        view = self._view(box, box.offset, box.shape)
        return Resident(
            name=name,
            tp_rank=self._tp_rank,
            offset=box.offset,
            shape=box.shape,
            fingerprint=fingerprint(
                view.view(np.uint8),
                itemsize=view.itemsize,
                global_shape=self._shapes[box.tensor],
                offset=box.offset,
                shape=box.shape,
            ),
        )

    def _view(self, box: Slice, low: Sequence[int], shape: Sequence[int]) -> np.ndarray[Any, Any]:
        """The place, in this rank, of the box `shape` at `low` (both of the checkpoint tensor) inside `box`."""
        stacked = len(box.at) - len(box.offset)
        target = self._arrays[box.param]
        for expert in box.at[:stacked]:
            target = target[expert]
        index = tuple(
            slice(at + first - start, at + first - start + size)
            for at, first, start, size in zip(box.at[stacked:], low, box.offset, shape, strict=True)
        )
        view: np.ndarray[Any, Any] = target[index]
        return view

    def _plan(self, manifest: Manifest) -> _Plan:
        names = held_names(self._config, manifest)
        boxes = [self._layout.slices.get(names[name], ()) for name in manifest.tensors.names]
        ndims = [len(shape) for shape in manifest.tensors.shapes]
        itemsizes = manifest.tensors.itemsizes.tolist()
        offsets, shapes = (column.tolist() for column in manifest.piece_boxes)
        tensors, starts = manifest.piece_tensor.tolist(), manifest.piece_offset.tolist()
        copies: list[tuple[_Copy, ...]] = []
        for bucket in range(manifest.buckets):
            here: list[_Copy] = []
            for piece in manifest.bucket_pieces(bucket):
                tensor = tensors[piece]
                ndim, itemsize = ndims[tensor], itemsizes[tensor]
                for box in boxes[tensor]:
                    copy = self._piece_copy(box, offsets[piece][:ndim], shapes[piece][:ndim], starts[piece], itemsize)
                    if copy is not None:
                        here.append(copy)
            copies.append(tuple(here))
        return _Plan(manifest, tuple(copies), names)

    def _piece_copy(
        self, box: Slice, offset: Sequence[int], shape: Sequence[int], start: int, itemsize: int
    ) -> _Copy | None:
        """How the part of `box` that a piece (`offset`, `shape`; at byte `start` of its slot) brings gets there."""
        low = [max(a, b) for a, b in zip(box.offset, offset, strict=True)]
        size = [
            min(a + n, b + m) - first
            for a, n, b, m, first in zip(box.offset, box.shape, offset, shape, low, strict=True)
        ]
        if any(n <= 0 for n in size):
            return None
        strides = [itemsize] * len(shape)
        for d in range(len(shape) - 1, 0, -1):
            strides[d - 1] = strides[d] * shape[d]
        at = start + sum((first - o) * stride for first, o, stride in zip(low, offset, strides, strict=True))
        return _Copy(self._view(box, low, size), at, tuple(strides))


def _copy(copies: Sequence[_Copy], slot: memoryview) -> None:
    """Fill every target from `slot`. In a function of its own: views of the slot must be gone when the lease ends."""
    for target, offset, strides in copies:
        np.copyto(target, np.ndarray(target.shape, target.dtype, slot, offset, strides))
