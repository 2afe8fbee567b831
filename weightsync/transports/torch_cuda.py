"""CUDA-IPC handles for stock engines on this node's GPUs.

Every copy lies on the bridge's GPU and is exported once, by torch's own `reduce_tensor`: a reference counter of its own
in shared memory, 1 when it is made. torch's importer synchronises its stream and takes the counter down when it frees
what it mapped, so 0 means read and released; the bridge reads the counter where torch keeps it. Handles may be opened
on any GPU of the node if the reader puts its own device in the place of ours (argument 6), which the adapters see to.
(`CudaIPCRefCountersFile` in torch/csrc/CudaIPCTypes.h: int64 cells behind the 64 bytes of a refcounted file.)

torch and the CUDA context are loaded when the first reader is offered something, in the bridge, never in the daemon.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from msgspec import Meta

from weightsync.errors import TransportError
from weightsync.ipc.descriptors import Natural, ReaderName, seal, unseal
from weightsync.transports.base import Capabilities
from weightsync.transports.copies import CopySender
from weightsync.transports.torch_shm import HEADER_BYTES

if TYPE_CHECKING:
    import torch

__all__ = ["TorchCudaSender", "TorchCudaTicket"]

logger = logging.getLogger(__name__)

_COUNTER = struct.Struct("<q")
Blob = Annotated[bytes, Meta(max_length=1024)]


class TorchCudaTicket(msgspec.Struct, frozen=True, kw_only=True):
    """What a ticket says: the arguments of torch's `rebuild_cuda_tensor` for the bucket as uint8 [nbytes]."""

    reader: ReaderName
    nbytes: Natural
    checksum: Annotated[int, Meta(ge=0)]
    device: Natural  # the bridge's own ordinal: a reader puts its own in its place
    storage_handle: Blob
    storage_nbytes: Natural
    storage_offset: Natural  # bytes, of the storage in what the handle opens
    counter_handle: Blob
    counter: Natural
    event_handle: Blob
    event_sync: bool

    @classmethod
    def unpack(cls, ticket: bytes) -> Self:
        """The ticket in bytes from outside. Raises `CodecError` only."""
        return unseal(ticket, b"U", cls)


class _Export:
    """A copy on the bridge's GPU."""

    def __init__(self, data: memoryview, device: torch.device) -> None:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        self._tensor: torch.Tensor | None = torch.empty(len(data), dtype=torch.uint8, device=device)
        self._tensor.copy_(torch.frombuffer(data, dtype=torch.uint8))
        torch.cuda.synchronize(device)
        _, self._args = reduce_tensor(self._tensor)  # type: ignore[no-untyped-call]
        self._counters = _counters(self._args[11])

    @property
    def released(self) -> bool:
        count: int = _COUNTER.unpack_from(self._counters, HEADER_BYTES + _COUNTER.size * self._args[12])[0]
        return count <= 0

    def ticket(self, reader: str, checksum: int) -> bytes:
        a = self._args
        found = TorchCudaTicket(
            reader=reader,
            nbytes=a[1][0],
            checksum=checksum,
            device=a[6],
            storage_handle=a[7],
            storage_nbytes=a[8],
            storage_offset=a[9],
            counter_handle=a[11],
            counter=a[12],
            event_handle=a[13],
            event_sync=a[14],
        )
        return seal(b"U", found)

    def remove(self) -> None:
        import torch

        self._tensor = None
        self._counters.close()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]  # what a reader has not released stays allocated until torch finds it released


def _counters(handle: bytes) -> mmap.mmap:
    """torch's file of reference counters, read-only."""
    fd = os.open(f"/dev/shm{handle.decode()}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


class TorchCudaSender(CopySender):
    """Exports copies on one GPU of this process: that of the bridge's index, going round."""

    capabilities = Capabilities(device="cuda", scope="node", collective=False)

    def __init__(self, *args: Any, index: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._index = index
        self._device: torch.device | None = None

    def _check_possible(self) -> None:
        if self._device is not None:
            return
        import torch

        if not torch.cuda.is_available():
            raise TransportError(
                f"this bridge's torch ({torch.__version__}) sees no GPU",
                hint="stock engines on GPUs are given CUDA-IPC handles: start weightsyncd where the GPUs are visible",
            )
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")  # whose memory has no handles
        self._device = torch.device("cuda", self._index % torch.cuda.device_count())
        torch.empty(1, device=self._device)
        logger.info("copies for stock engines lie on %s, %s", self._device, torch.cuda.get_device_name(self._device))

    def _copy(self, data: memoryview) -> _Export:
        import torch

        assert self._device is not None
        try:
            return _Export(data, self._device)
        except torch.cuda.OutOfMemoryError as error:
            raise TransportError(
                f"no room for a copy of {len(data)} bytes on {self._device}",
                hint="stock engines need room for one bucket for each of their ranks: lower arena.slot_bytes, or the "
                "engine's share of the GPU",
            ) from error
