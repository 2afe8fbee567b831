"""Reads buckets of one manifest out of slots on GPUs, for one worker on its own GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightsync.device.buckets import CheckedBuckets, lent_tensor
from weightsync.device.launch import BoxKernel
from weightsync.device.leases import LeaseKeeper

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.plan.manifest import Manifest
    from weightsync.transports.base import Lease

__all__ = ["GpuBuckets"]


class GpuBuckets:
    """Reads buckets for one worker."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kernel = BoxKernel(device)
        self._buckets: CheckedBuckets | None = None
        self._manifest: Manifest | None = None
        self._leases = LeaseKeeper(device)
        self._streams: list[torch.cuda.Stream] = []  # one for each owner of buckets
        self._owners = 0  # of this manifest

    def expect(self, manifest: Manifest, *, deadline: float) -> None:
        """Expect buckets of this manifest. Waits until the last push's buckets are read."""
        self.settle(deadline=deadline)
        if manifest is not self._manifest:
            self._manifest, self._buckets = manifest, CheckedBuckets(self._kernel, manifest)
            self._owners = 1 + int(manifest.bucket_owner.max(initial=0))
            self._streams += [torch.cuda.Stream(self.device) for _ in range(self._owners - len(self._streams))]

    def settle(self, *, deadline: float) -> None:
        """Wait until the GPU is past all that `lend` has queued. Raises as `LeaseKeeper.settle`."""
        self._leases.settle(deadline=deadline)

    def lend(self, bucket: int, lease: Lease, take: Callable[[torch.Tensor, int], None]) -> None:
        """Have `take` queue work that reads the bucket, on its owner's stream. The lease ends when the GPU is past it.

        `take` gets the bucket, uint8 [nbytes], and the number of owners.
        """
        assert self._manifest is not None, "`expect` comes first"
        stream = self._streams[int(self._manifest.bucket_owner[bucket])]
        with torch.cuda.device(self.device):
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                try:
                    take(lent_tensor(lease.address, lease.nbytes, self.device), self._owners)
                finally:
                    event = torch.cuda.Event()
                    event.record(stream)
                    self._leases.keep(lease, event)

    def copy(self, bucket: int, lease: Lease, *, deadline: float) -> torch.Tensor:
        """Copy and check a bucket; returns uint8 [nbytes]. The slot may change once this has returned."""
        mine = torch.empty(lease.nbytes, dtype=torch.uint8, device=self.device)
        self._copy_into(mine, bucket, lease)
        return mine

    def _copy_into(self, mine: torch.Tensor, bucket: int, lease: Lease) -> None:
        """Copy a bucket into `mine` on the current stream, wait, and check it."""
        assert self._buckets is not None, "`expect` comes first"
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            lease.confirm(self._buckets.copy(bucket, lease.address, mine, stream))
