"""Buckets of slots on GPUs, for a reader that keeps them in host memory and works on no GPU of its own.

A bucket is copied to this process's GPU in one piece, whichever GPU its slot lies on, checked there as every reader
checks, and the slot is free. What was checked then goes to host memory by the GPU's copy engine: no slot waits for
that, and no multiprocessor. It takes the room of one bucket on that GPU, for good from the first push on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightsync.device.buckets import flat_sum
from weightsync.device.reading import GpuBuckets
from weightsync.device.waiting import await_events
from weightsync.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.plan.manifest import Manifest
    from weightsync.transports.base import Lease

__all__ = ["FetchedBuckets"]


class FetchedBuckets(GpuBuckets):
    """One reader's way to them."""

    def __init__(self, device: torch.device, room: Callable[[int], torch.Tensor]) -> None:
        """`room` gives host memory, uint8 of that many bytes, for a bucket to stay in."""
        super().__init__(device)
        self._room = room
        self._stage = torch.empty(0, dtype=torch.uint8, device=device)

    def warm(self) -> None:
        """Do once what would take the first bucket its time: make the CUDA context, and compile the kernel."""
        probe = torch.zeros(256, dtype=torch.uint8, device=self.device)
        flat_sum(probe.data_ptr(), probe.numel(), self.device)

    def expect(self, manifest: Manifest, *, deadline: float) -> None:
        """As the base class. Raises `EngineError` where the GPU has no room for a bucket."""
        super().expect(manifest, deadline=deadline)
        longest = int(manifest.bucket_nbytes.max(initial=0))
        if longest <= self._stage.numel():
            return
        self._stage = torch.empty(0, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()  # else the smaller one would stay with torch
        try:
            self._stage = torch.empty(longest, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise EngineError(
                f"a bucket of {longest} bytes is to be fetched by way of a GPU that has {free} of {total} bytes free",
                hint="make arena.slot_bytes smaller, or give engine and trainer a smaller share of the GPU",
            ) from error

    def settle(self, *, deadline: float) -> None:
        """Return when nothing is read or fetched any more: also what a call that ran out of time has left."""
        super().settle(deadline=deadline)
        with torch.cuda.device(self.device):
            self._await("what was fetched", deadline)

    def copy(self, bucket: int, lease: Lease, *, deadline: float) -> torch.Tensor:
        """A bucket in host memory, uint8 [nbytes], checked; the lease has ended when this returns."""
        with torch.cuda.device(self.device):
            mine = self._stage[: lease.nbytes]
            self._copy_into(mine, bucket, lease)
            lease.release()
            kept = self._room(mine.numel())
            kept.copy_(mine, non_blocking=True)
            self._await(f"bucket {bucket} on its way to host memory", deadline)
        return kept

    def _await(self, what: str, deadline: float) -> None:
        await_events([torch.cuda.current_stream(self.device)], what, deadline=deadline)
