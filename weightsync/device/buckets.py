"""Copies whole buckets out of slots on a GPU, and takes the checksum of the reader's copy.

The checksum is put together from the fingerprints of the tensors in the bucket, as it is by the trainer's ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.utils.dlpack

from weightsync.device.launch import COPY, SUM, BoxKernel, Table
from weightsync.device.table import SLOT, Place, box_items, joined
from weightsync.fingerprint import bucket_sum
from weightsync.ipc.cuda import cupy
from weightsync.plan.boxes import packed_strides

if TYPE_CHECKING:
    from weightsync.plan.manifest import Manifest

__all__ = ["CheckedBuckets", "FlatCopy", "copied", "flat_sum", "lent_tensor"]


def flat_sum(address: int, nbytes: int, device: torch.device) -> int:
    """Fingerprint `nbytes` of GPU memory as one tensor of bytes. Launches a kernel and waits for it."""
    kernel = BoxKernel(device)
    items = box_items((nbytes,), 1, Place(SLOT, 0, (1,)), None, tensor_shape=(nbytes,), offset=(0,))
    totals = torch.zeros(1, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device)
    kernel.launch(kernel.table(items), SUM, stream=stream, slot=address, totals=totals)
    return int(totals.cpu().numpy().view(np.uint64)[0])


def lent_tensor(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Return memory mapped for `device`, on whichever GPU it lies, as uint8 [nbytes]. Valid while it is mapped.

    DLPack says on which device to use the memory. Without it torch would ask the driver, which names the owner's GPU.
    """
    c = cupy()
    memory = c.cuda.UnownedMemory(address, nbytes, None, device.index)
    array = c.ndarray((nbytes,), dtype=np.uint8, memptr=c.cuda.MemoryPointer(memory, 0))
    with c.cuda.Device(device.index):
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor


class FlatCopy:
    """Copies contiguous bytes into `out`, uint8 [nbytes] on the kernel's GPU. Making it waits for `stream`.

    It must live until the stream is past its launches.
    """

    def __init__(self, kernel: BoxKernel, out: torch.Tensor, stream: torch.cuda.Stream) -> None:
        nbytes = out.numel()
        flat = box_items((nbytes,), 1, Place(SLOT, 0, (1,)), Place(0, 0, (1,)), tensor_shape=(nbytes,), offset=(0,))
        self._kernel, self._stream = kernel, stream
        with torch.cuda.device(kernel.device), torch.cuda.stream(stream):
            self._base = torch.tensor([out.data_ptr()], device=kernel.device)
            self._table = kernel.table(flat)

    def launch(self, address: int) -> None:
        """Queue the copy of the bytes that begin at `address`."""
        self._kernel.launch(self._table, COPY, stream=self._stream, bases=self._base, slot=address)


def copied(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Copy the bytes that begin at `address` into new memory, uint8 [nbytes] on `device`. Waits for the copy."""
    out = torch.empty(nbytes, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)
    copy = FlatCopy(BoxKernel(device), out, stream)
    copy.launch(address)
    stream.synchronize()
    return out


class CheckedBuckets:
    """Copies and checks buckets of one manifest, for readers on the kernel's GPU."""

    def __init__(self, kernel: BoxKernel, manifest: Manifest) -> None:
        self._kernel = kernel
        self._manifest = manifest
        self._tables: dict[int, tuple[Table, np.ndarray[tuple[int], np.dtype[np.int32]]]] = {}

    def copy(self, bucket: int, address: int, out: torch.Tensor, stream: torch.cuda.Stream) -> int:
        """Copy the bucket that begins at `address` into `out`, uint8 [nbytes]. Waits. Returns the copy's checksum."""
        copy = FlatCopy(self._kernel, out, stream)
        copy.launch(address)
        return self.checksum(bucket, out.data_ptr(), stream)

    def checksum(self, bucket: int, address: int, stream: torch.cuda.Stream) -> int:
        """Return the checksum of the bucket that begins at `address`. Waits for `stream`."""
        table, tensors = self._tables.get(bucket) or self._table(bucket)
        with torch.cuda.device(self._kernel.device), torch.cuda.stream(stream):
            totals = torch.zeros(max(1, len(tensors)), dtype=torch.int64, device=self._kernel.device)
            self._kernel.launch(table, SUM, stream=stream, slot=address, totals=totals)
            found = totals.cpu().numpy().view(np.uint64)[: len(tensors)]
        return bucket_sum(tensors, found)

    def _table(self, bucket: int) -> tuple[Table, np.ndarray[tuple[int], np.dtype[np.int32]]]:
        manifest = self._manifest
        pieces = manifest.bucket_pieces(bucket)
        tensors, totals = np.unique(manifest.piece_tensor[pieces.start : pieces.stop], return_inverse=True)
        parts = []
        for piece, total in zip(pieces, totals.tolist(), strict=True):
            tensor = int(manifest.piece_tensor[piece])
            offset, shape = manifest.piece_box(piece)
            itemsize = int(manifest.tensors.itemsizes[tensor])
            src = Place(SLOT, int(manifest.piece_offset[piece]), packed_strides(shape, itemsize))
            whole = manifest.tensors.shapes[tensor]
            parts.append(box_items(shape, itemsize, src, None, tensor_shape=whole, offset=offset, total=total))
        found = self._tables[bucket] = (self._kernel.table(joined(parts)), tensors)
        return found
