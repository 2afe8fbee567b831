"""Fetches buckets out of slots on GPUs, for a reader that keeps them in host memory and has no work on a GPU.

A bucket is copied whole to this process's GPU, from whichever GPU its slot lies on. It is checked there as by every
reader, and its slot is free. Then the GPU's copy engine brings it to host memory, which takes up no slot and no
multiprocessor. From the first push on, one bucket's room on this GPU stays taken.
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
    """Fetches buckets for one reader."""

    def __init__(self, device: torch.device, room: Callable[[int], torch.Tensor]) -> None:
        """`room(nbytes)` returns host memory in which a bucket may stay, uint8 [nbytes]."""
        super().__init__(device)
        self._room = room
        self._stage = torch.empty(0, dtype=torch.uint8, device=device)

    def warm(self) -> None:
        """Make the CUDA context and compile the kernel, so that the first bucket need not wait for that."""
        probe = torch.zeros(256, dtype=torch.uint8, device=self.device)
        flat_sum(probe.data_ptr(), probe.numel(), self.device)

    def expect(self, manifest: Manifest, *, deadline: float) -> None:
        """Do as the base class. Raises `EngineError` if the GPU has no room for a bucket."""
        super().expect(manifest, deadline=deadline)
        longest = int(manifest.bucket_nbytes.max(initial=0))
        if longest <= self._stage.numel():
            return
        self._stage = torch.empty(0, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()  # else torch would keep the smaller one
        try:
            self._stage = torch.empty(longest, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise EngineError(
                f"a bucket of {longest} bytes is to be fetched by way of a GPU that has {free} of {total} bytes free",
                hint="make arena.slot_bytes smaller, or give engine and trainer a smaller share of the GPU",
            ) from error

    def settle(self, *, deadline: float) -> None:
        """Wait until nothing is read or fetched any more, not even by a call that ran out of time."""
        super().settle(deadline=deadline)
        with torch.cuda.device(self.device):
            self._await("what was fetched", deadline)

    def copy(self, bucket: int, lease: Lease, *, deadline: float) -> torch.Tensor:
        """Fetch a bucket into host memory, uint8 [nbytes], checked. The lease has ended when this returns."""
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
