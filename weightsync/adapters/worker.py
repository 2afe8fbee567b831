"""The common part of our plugins inside an engine's worker: tickets in, named tensors out.

    slots = SlotReader(device)
    slots.begin(manifest, offers, deadline=...)
    for bucket, ticket in ...:
        model.load_weights(slots.read(bucket, ticket, deadline=...).tensors())
    slots.finish()

Arenas are mapped once and kept. `read` copies a bucket in one piece to the worker's device, checks the copy, and
releases the slot before any of it is loaded. So engines may keep the tensors as long as they like, and the next bucket
is on its way while they load.

`pull` copies only the needed bytes, straight out of the slot. It is for buckets that need no loader, in pushes whose
result is compared in the model afterwards. On GPUs it returns when the copies are queued. Each owner of buckets has its
own stream, so that a worker reads from every GPU at once.

A push may also need no buckets: `draw` reads the weights out of the trainer's memory, and `places` shows where bridges
may write them.
"""

from __future__ import annotations

import time
import warnings
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightsync.adapters.places import shown
from weightsync.device.reading import GpuBuckets
from weightsync.drawing.direct import Direct
from weightsync.errors import CodecError, LocalProtocolError, TransportBroken
from weightsync.ipc.arena import ArenaOffer
from weightsync.ipc.descriptors import checksum
from weightsync.replay.bucket import ReadBucket
from weightsync.transports.cuda_ipc import CudaIpcReceiver
from weightsync.transports.shm import ShmReceiver

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from weightsync.adapters.places import Shown
    from weightsync.plan.draws import Wants
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest
    from weightsync.transports.base import BucketReceiver, Lease

__all__ = ["SlotReader"]

_SETTLES = 10.0  # seconds that a GPU may take for what is queued


class _Update:
    """An update under way."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.read = np.zeros(manifest.pieces, dtype=np.bool_)
        self.missing: dict[int, int] = {}  # tensor cut over several buckets → bytes still missing
        self.parts: dict[int, torch.Tensor] = {}  # the same tensor → its buffer, uint8 [nbytes]
        self.cut_pieces: dict[int, list[int]] = {}  # bucket → its pieces that are not a whole tensor
        self.pulls_until = 0.0  # deadline of the latest pull that was queued
        whole = manifest.tensors.sizes[manifest.piece_tensor]
        for piece in np.flatnonzero(manifest.piece_nbytes != whole).tolist():
            self.cut_pieces.setdefault(int(manifest.piece_bucket[piece]), []).append(piece)


class SlotReader:
    """Reads buckets out of this node's arenas onto `device`. Each worker has one, and uses it from one thread."""

    def __init__(self, device: torch.device | str, *, through: Callable[[], GpuBuckets] | None = None) -> None:
        """`through` gives a reader in host memory access to slots on GPUs; a reader on a GPU uses its own GPU."""
        self.device = torch.device(device)
        self._through = through
        self._receiver: BucketReceiver = ShmReceiver()
        self._gpu: GpuBuckets | None = None  # set while slots lie on GPUs
        self._update: _Update | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest of the open update. Raises `LocalProtocolError` if no update is open."""
        return self._open().manifest

    def begin(self, manifest: Manifest, offers: Sequence[bytes], *, deadline: float) -> None:
        """Open an update, dropping one that is open, and attach to the arenas on offer.

        Raises `CodecError` or `TransportBroken`, or `TransportTimeout` if the GPU still runs copies of the last update.
        No update is open then.
        """
        self._update = None
        self._direct.begin(deadline=deadline)
        for dtype in sorted(set(manifest.tensors.dtypes)):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise CodecError(f"torch {torch.__version__} has no dtype {dtype}")
        if offers and (ArenaOffer.unpack(offers[0]).memory is None) != (self._gpu is None):
            self._switch(deadline)
        if self._gpu is not None:
            self._gpu.expect(manifest, deadline=deadline)
        for offer in offers:
            self._receiver.accept(offer, deadline=deadline)
        self._update = _Update(manifest)

    def read(self, bucket: int, ticket: bytes, *, deadline: float) -> ReadBucket:
        """Copy one bucket to this reader's device; the result has the tensors that are whole now.

        Raises `LocalProtocolError` for a bucket that is not of the update or was read before, otherwise as
        `BucketReceiver.receive`.
        """
        update = self._expecting(bucket)
        return self._as_read(update, bucket, self._copy(bucket, ticket, self._nbytes(bucket), deadline))

    def lends(self, bucket: int) -> bool:
        """Whether `pull` works for this bucket: slots and weights are both in host memory, or both on GPUs.

        On GPUs the bucket must also have no part of a tensor that is cut over several buckets.
        """
        if self._gpu is None or self.device.type == "cpu":
            return self._gpu is None and self.device.type == "cpu"
        return bucket not in self._open().cut_pieces

    def pull(self, bucket: int, ticket: bytes, take: Callable[[ReadBucket, int], None], *, deadline: float) -> None:
        """Call `take(bucket, streams)`, which copies the bytes it needs straight out of the slot.

        The slot is released when `take` returns or, on a GPU, when the GPU is past the work that `take` queued on the
        current stream. `streams` is the number of streams on which buckets are pulled side by side. Only the lease is
        checked, and `take` must not keep any of the data. Raises as `read`, and whatever `take` raises.
        """
        update = self._expecting(bucket)
        if self._gpu is not None:
            update.pulls_until = deadline
            lease = self._receiver.receive(ticket, deadline=deadline, verify=False)

            def take_checked(data: torch.Tensor, share: int) -> None:
                self._check_size(lease, self._nbytes(bucket))
                take(self._as_read(update, bucket, data), share)

            self._gpu.lend(bucket, lease, take_checked)
            return
        with self._receiver.receive(ticket, deadline=deadline, verify=False) as lease:
            self._check_size(lease, self._nbytes(bucket))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*not writable.*")  # torch has no read-only tensors
                data = torch.frombuffer(lease.view, dtype=torch.uint8)
            take(self._as_read(update, bucket, data), 1)
            del data

    def draw(self, exposures: Exposures, wants: Wants, *, deadline: float) -> str:
        """Read everything in `wants` out of the trainer's memory instead of buckets. Returns as `Drawer.draw`."""
        return self._direct.draw(exposures, wants, self.manifest, deadline=deadline)

    def places(self, wants: Wants, known: Collection[bytes]) -> Shown:
        """Show where bridges may write everything in `wants`, until `finish` and instead of buckets.

        `known` are digests of places that the daemon has been shown before.
        """
        return shown(self._direct.places(wants, self.manifest), known)

    def finish(self) -> bool:
        """End the update once everything that `pull` queued is done, and return whether it came without buckets.

        Raises `LocalProtocolError` naming the first tensor that did not come whole.
        """
        update, self._update = self._open(), None
        self.settle(deadline=update.pulls_until)
        if self._direct.finish():
            return True
        if not update.read.all():
            piece = int(np.argmin(update.read))
            name = update.manifest.tensors.names[int(update.manifest.piece_tensor[piece])]
            missing = int(update.read.size - np.count_nonzero(update.read))
            raise LocalProtocolError(
                f"tensor {name!r} did not come whole; {missing} of {update.manifest.pieces} pieces are missing",
                bucket=int(update.manifest.piece_bucket[piece]),
            )
        return False

    def settle(self, *, deadline: float | None = None) -> None:
        """Wait until the GPU is past everything that `pull` and `draw` queued; without a deadline, ten seconds at most.

        Raises as `LeaseKeeper.settle`.
        """
        until = deadline if deadline is not None else time.monotonic() + _SETTLES
        if self._gpu is not None:
            self._gpu.settle(deadline=until)
        self._direct.settle(deadline=until)

    def close(self) -> None:
        """Drop an open update and detach from every arena."""
        self._update = None
        try:
            self.settle()
        finally:
            self._direct.give_up()
            self._receiver.close()

    @cached_property
    def _direct(self) -> Direct:
        return Direct(self._gpu_index() if self.device.type == "cuda" else None)

    def _expecting(self, bucket: int) -> _Update:
        update = self._open()
        manifest = update.manifest
        if not 0 <= bucket < manifest.buckets:
            raise LocalProtocolError(f"the update has buckets 0 to {manifest.buckets - 1}", bucket=bucket)
        if update.read[manifest.bucket_pieces(bucket).start]:
            raise LocalProtocolError("the bucket was read before", bucket=bucket)
        self._direct.give_up()
        return update

    def _nbytes(self, bucket: int) -> int:
        return int(self.manifest.bucket_nbytes[bucket])

    def _as_read(self, update: _Update, bucket: int, data: torch.Tensor) -> ReadBucket:
        manifest = update.manifest
        pieces = manifest.bucket_pieces(bucket)
        update.read[pieces.start : pieces.stop] = True
        cut = {}
        for piece in update.cut_pieces.get(bucket, ()):
            start, nbytes = int(manifest.piece_offset[piece]), int(manifest.piece_nbytes[piece])
            tensor = int(manifest.piece_tensor[piece])
            whole = self._whole(update, tensor, piece, data[start : start + nbytes])
            if whole is not None:
                cut[tensor] = whole
        return ReadBucket(manifest, bucket, data, cut)

    @staticmethod
    def _check_size(lease: Lease, nbytes: int) -> None:
        if lease.nbytes != nbytes:
            raise TransportBroken(f"the bucket has {lease.nbytes} bytes, its manifest says {nbytes}")

    def _open(self) -> _Update:
        if self._update is None:
            raise LocalProtocolError("no update is open", hint="begin first")
        return self._update

    def _gpu_index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _switch(self, deadline: float) -> None:
        """Change receivers, because the node's slots have moved between host memory and GPUs."""
        self.settle(deadline=deadline)
        before = self._receiver
        if self._gpu is not None:
            self._gpu, self._receiver = None, ShmReceiver()
            before.close()
            return
        if self.device.type == "cuda":
            gpu = GpuBuckets(torch.device("cuda", self._gpu_index()))
        elif self._through is not None:
            gpu = self._through()
        else:
            raise TransportBroken(
                f"the node's slots lie on GPUs, and this worker's weights on {self.device}",
                hint='arena.device = "cpu" in the node config serves engines on a CPU',
            )
        self._gpu, self._receiver = gpu, CudaIpcReceiver(gpu.device.index)
        before.close()

    def _copy(self, bucket: int, ticket: bytes, nbytes: int, deadline: float) -> torch.Tensor:
        """Copy the bucket to this device, uint8 [nbytes], and release its slot."""
        checked_here = self.device.type == "cpu" or self._gpu is not None
        with self._receiver.receive(ticket, deadline=deadline, verify=not checked_here) as lease:
            self._check_size(lease, nbytes)
            if self._gpu is not None:
                return self._gpu.copy(bucket, lease, deadline=deadline)
            if checked_here:
                mine = np.empty(nbytes, dtype=np.uint8)
                np.copyto(mine, np.frombuffer(lease.view, dtype=np.uint8))
                lease.confirm(checksum(mine.data))
                return torch.from_numpy(mine)
            data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            data.copy_(torch.frombuffer(lease.view, dtype=torch.uint8))
            torch.accelerator.synchronize(self.device)  # the slot may change as soon as it is released
            return data

    def _whole(self, update: _Update, tensor: int, piece: int, data: torch.Tensor) -> torch.Tensor | None:
        """Keep a piece of a cut tensor. Returns the tensor's bytes if this piece completes it, else None."""
        table = update.manifest.tensors
        start = int(update.manifest.piece_start[piece]) * int(table.itemsizes[tensor])
        parts = update.parts.get(tensor)
        if parts is None:
            nbytes = int(table.sizes[tensor])
            parts = update.parts[tensor] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            update.missing[tensor] = nbytes
        parts[start : start + data.numel()] = data
        update.missing[tensor] -= data.numel()
        if update.missing[tensor]:
            return None
        del update.missing[tensor]
        return update.parts.pop(tensor)
