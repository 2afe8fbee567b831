"""A rank's parameters on a GPU: each bucket is one launch, and its lease ends when the GPU is past the launch.

Loading returns when the launch is queued. Each owner of buckets has its own stream, so that a rank reads from every GPU
at once.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import torch

from weightsync.adapters.reference.loading import wanted
from weightsync.device.buckets import CheckedBuckets, FlatCopy
from weightsync.device.launch import COPY, SUM, BoxKernel, Table
from weightsync.device.leases import LeaseKeeper
from weightsync.device.table import SLOT, Place, box_items, joined
from weightsync.plan.draws import Wants

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.adapters.reference.loading import LoadedShard, LoadingPlan
    from weightsync.plan.boxes import Words
    from weightsync.plan.draws import Wanted
    from weightsync.transports.base import Lease

__all__ = ["DeviceParameters", "Trial"]

_CYCLES = 1.7e9  # clock cycles of a GPU in a second, about


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For tests of the fence: a reader that copies each bucket whole and reports the checksum of its copy."""

    slow: float = 0.0  # before each read its GPU waits for a random time up to these seconds
    hasty: bool = False  # it releases a bucket before it has read it


class _Prepared(NamedTuple):
    plan: LoadingPlan
    copies: tuple[Table, ...]  # per bucket
    residents: Table
    buckets: CheckedBuckets
    wanted: tuple[Wanted, ...]
    owners: int  # bridges that buckets come from, each on a stream of its own


class DeviceParameters:
    """Loads and fingerprints `tensors`: parameters by name, contiguous, on one GPU, which must not move."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], trial: Trial | None = None) -> None:
        self._bases = {name: at for at, name in enumerate(tensors)}
        self._device = next(iter(tensors.values())).device
        self._kernel = BoxKernel(self._device)
        self._addresses = [tensor.data_ptr() for tensor in tensors.values()]
        pointers = np.array(self._addresses, dtype=np.uint64)
        self._pointers = torch.from_numpy(pointers.view(np.int64)).to(self._device)
        self._streams: list[torch.cuda.Stream] = []
        self._leases = LeaseKeeper(self._device)
        self._trial = trial
        self._random = random.Random(self._device.index)  # so that ranks wait for different times

    def prepare(self, plan: LoadingPlan) -> _Prepared:
        """Turn a plan into tables on the GPU."""
        shapes = plan.manifest.tensors.shapes
        copies = []
        for bucket in plan.copies:
            parts = [
                box_items(
                    box.held.shape,
                    box.held.itemsize,
                    Place(SLOT, box.at, box.strides),
                    self._place(box.held),
                    tensor_shape=shapes[box.held.tensor],
                    offset=box.held.offset,
                )
                for box in bucket
            ]
            copies.append(self._kernel.table(joined(parts)))
        residents = [
            box_items(
                held.shape,
                held.itemsize,
                self._place(held),
                None,
                tensor_shape=shapes[held.tensor],
                offset=held.offset,
                total=at,
            )
            for at, held in enumerate(plan.residents)
        ]
        buckets = CheckedBuckets(self._kernel, plan.manifest)
        table = self._kernel.table(joined(residents))
        owners = 1 + int(plan.manifest.bucket_owner.max(initial=0))
        return _Prepared(plan, tuple(copies), table, buckets, wanted(plan, list(self._bases)), owners)

    def load(self, prepared: _Prepared, bucket: int, lease: Lease) -> None:
        """Queue the copies of a bucket. Its lease is released when the GPU is past them."""
        while len(self._streams) < prepared.owners:
            self._streams.append(torch.cuda.Stream(self._device))
        stream = self._streams[int(prepared.plan.manifest.bucket_owner[bucket])]
        try:
            if self._trial is not None:
                self._try(self._trial, prepared, bucket, lease, stream)
            else:
                self._copy(prepared, bucket, lease.address, stream)
                self._leases.keep(lease, _recorded(stream))
        except BaseException:
            lease.release()
            raise

    def wants(self, prepared: _Prepared) -> Wants:
        """Return the boxes to draw out of a trainer's memory, and where to put them."""
        return Wants(prepared.wanted, self._addresses)

    def settle(self, *, deadline: float) -> None:
        """Wait for the loads that are queued. Raises as `LeaseKeeper.settle`."""
        self._leases.settle(deadline=deadline)

    def fingerprints(self, prepared: _Prepared) -> Words:
        """Fingerprint the parameters' residents as they are now: uint64 [residents]."""
        count = len(prepared.plan.residents)
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            totals = torch.zeros(max(1, count), dtype=torch.int64, device=self._device)
            self._kernel.launch(prepared.residents, SUM, stream=stream, bases=self._pointers, totals=totals)
            sums: Words = totals.cpu().numpy().view(np.uint64)[:count]
        return sums

    def close(self) -> None:
        """Wait for the GPU. Parameters may be freed after this."""
        torch.cuda.synchronize(self._device)

    def _place(self, held: LoadedShard) -> Place:
        return Place(self._bases[held.param], held.at, held.strides)

    def _copy(self, prepared: _Prepared, bucket: int, slot: int, stream: torch.cuda.Stream) -> None:
        self._kernel.launch(
            prepared.copies[bucket],
            COPY,
            stream=stream,
            bases=self._pointers,
            slot=slot,
            share=prepared.owners,
        )

    def _try(self, trial: Trial, prepared: _Prepared, bucket: int, lease: Lease, stream: torch.cuda.Stream) -> None:
        """Load a bucket as `trial` says: wait on the GPU, copy the bucket whole, and report the copy's checksum."""
        slot, nbytes = lease.address, lease.nbytes
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            mine = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            copy = FlatCopy(self._kernel, mine, stream)
            torch.cuda._sleep(int(self._random.random() * trial.slow * _CYCLES))
            copy.launch(slot)
        self._copy(prepared, bucket, mine.data_ptr(), stream)
        if trial.hasty:
            lease.release()

        def look(_kept: FlatCopy = copy) -> None:
            lease.confirm(prepared.buckets.checksum(bucket, mine.data_ptr(), stream))

        self._leases.keep(lease, _recorded(stream), look)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event
