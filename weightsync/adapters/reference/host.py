"""A rank's parameters in host memory, loaded by numpy: each box is one copy, which costs 2 µs besides its bytes."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weightsync.adapters.reference.loading import wanted
from weightsync.fingerprint import fingerprint
from weightsync.plan.draws import Wants

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightsync.adapters.reference.loading import LoadedShard, LoadingPlan
    from weightsync.plan.boxes import Words
    from weightsync.plan.draws import Wanted
    from weightsync.transports.base import Lease

    Array = np.ndarray[Any, Any]

__all__ = ["HostParameters"]


class _Copy(NamedTuple):
    target: Array  # view of a parameter, as unsigned integers of the element's size
    at: int  # bytes into the slot
    strides: tuple[int, ...]


class _Prepared(NamedTuple):
    plan: LoadingPlan
    copies: tuple[tuple[_Copy, ...], ...]
    residents: tuple[Array, ...]
    wanted: tuple[Wanted, ...]


class HostParameters:
    """Loads and fingerprints `arrays`: the parameters' own memory by name, contiguous, which must not move."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = {name: array.reshape(-1).view(np.uint8) for name, array in arrays.items()}
        self._addresses = [array.ctypes.data for array in self._arrays.values()]

    def prepare(self, plan: LoadingPlan) -> _Prepared:
        """Make the views that a plan needs."""
        copies = tuple(tuple(_Copy(self._view(b.held), b.at, b.strides) for b in bucket) for bucket in plan.copies)
        residents = tuple(self._view(held).view(np.uint8) for held in plan.residents)
        return _Prepared(plan, copies, residents, wanted(plan, list(self._arrays)))

    def load(self, prepared: _Prepared, bucket: int, lease: Lease) -> None:
        """Copy this rank's boxes out of a bucket and release it."""
        with lease:
            _copy(prepared.copies[bucket], lease.view)

    def wants(self, prepared: _Prepared) -> Wants:
        """Return the boxes to draw out of a trainer's memory, and where to put them."""
        return Wants(prepared.wanted, self._addresses)

    def settle(self, *, deadline: float) -> None:
        """Do nothing: no copy is under way between calls."""

    def fingerprints(self, prepared: _Prepared) -> Words:
        """Fingerprint the parameters' residents as they are now: uint64 [residents]."""
        sums = np.empty(len(prepared.residents), dtype=np.uint64)
        # use all cores, up to 8: nothing else runs while an engine is verified, and numpy releases the GIL
        cores = min(8, len(os.sched_getaffinity(0)))
        shapes = prepared.plan.manifest.tensors.shapes

        def every(first: int) -> None:
            for at in range(first, len(sums), cores):
                held = prepared.plan.residents[at]
                sums[at] = fingerprint(
                    prepared.residents[at],
                    itemsize=held.itemsize,
                    global_shape=shapes[held.tensor],
                    offset=held.offset,
                    shape=held.shape,
                )

        with ThreadPoolExecutor(cores) as pool:
            deque(pool.map(every, range(cores)), maxlen=0)  # raises what a thread raised
        return sums

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _view(self, held: LoadedShard) -> Array:
        dtype = np.dtype(f"u{held.itemsize}")
        shape, strides = held.shape or (1,), held.strides or (held.itemsize,)
        return np.ndarray(shape, dtype, self._arrays[held.param].data, held.at, strides)


def _copy(copies: Sequence[_Copy], slot: memoryview) -> None:
    """Fill every target from `slot`. A function of its own, so that no view of the slot outlives the lease."""
    for target, at, strides in copies:
        np.copyto(target, np.ndarray(target.shape, target.dtype, slot, at, strides or (target.itemsize,)))
