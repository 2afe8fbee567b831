"""Draws and parcels on a GPU: one launch of the kernel over a table, on whichever GPUs the trainer's memory lies."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightsync.device.launch import COPY, BoxKernel, Table
from weightsync.device.table import SLOT, Place, box_items, joined
from weightsync.device.waiting import await_events
from weightsync.errors import TransportBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.device.table import Items
    from weightsync.plan.boxes import Ints
    from weightsync.plan.delivery import Staged
    from weightsync.plan.draws import Draw
    from weightsync.replay.kernel import Launcher

__all__ = ["DeviceCopies", "DeviceStaged"]

_SHARE = 2  # copies get half of the multiprocessors; the other half is for the kernels that send and receive


class DeviceCopies:
    """The copies of one layout's draws, on the GPU `device`."""

    def __init__(self, kernel: Launcher, device: torch.device, several: Sequence[Draw]) -> None:
        self._kernel, self._device = kernel, device
        counts = [0] * (1 + max((draw.rank for draw in several), default=-1))
        for draw in several:
            counts[draw.rank] = max(counts[draw.rank], 1 + draw.part)
        self._counts = counts  # for each rank, its parts up to the last one that is drawn from
        firsts = [0, *accumulate(counts)]  # each rank's first base; the targets' bases come last
        items = [
            box_items(
                draw.shape or (1,),
                draw.itemsize,
                Place(firsts[draw.rank] + draw.part, draw.source, draw.source_strides or (0,)),
                Place(firsts[-1] + draw.target, draw.at, draw.strides or (0,)),
                tensor_shape=draw.shape or (1,),
                offset=(0,) * max(1, len(draw.shape)),
            )
            for draw in several
        ]
        try:
            self._table = kernel.table(joined(items))
        except torch.OutOfMemoryError as error:
            raise TransportBroken(f"this GPU has no room for a table of {len(items)} copies: {error}") from error
        self._addresses: Ints = np.empty(0, dtype=np.int64)
        self._bases: torch.Tensor | None = None  # the addresses on the GPU
        self._done: torch.cuda.Event | None = None  # past the last launch

    @classmethod
    def on(cls, gpu: int, several: Sequence[Draw]) -> DeviceCopies:
        """Make copies that the kernel carries out on this process's GPU `gpu`."""
        device = torch.device("cuda", gpu)
        return cls(BoxKernel(device), device, several)

    def run(self, targets: Sequence[int], parts: Sequence[Ints], *, deadline: float) -> None:
        """Copy on the current stream, and wait. `targets` are addresses; `parts` are each rank's addresses.

        Raises `TransportTimeout`.
        """
        drawn = [rank[:count] for count, rank in zip(self._counts, parts, strict=False)]
        onto = np.array([*targets, 0], dtype=np.uint64).view(np.int64)
        addresses = np.concatenate([*drawn, onto])
        if self._bases is None or not np.array_equal(addresses, self._addresses):
            self._bases, self._addresses = torch.from_numpy(addresses).to(self._device), addresses
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._kernel.launch(self._table, COPY, stream=stream, bases=self._bases)
        if stream is not None:
            self._done = torch.cuda.Event()
            self._done.record(stream)
            self.settle(deadline=deadline)

    def settle(self, *, deadline: float) -> None:
        """Wait until the last `run` has copied everything. Raises `TransportTimeout`."""
        if self._done is not None:
            await_events([self._done], "drawing weights", deadline=deadline)


class DeviceStaged:
    """Copies each parcel (`weightsync/plan/delivery.py`) into a staging buffer if `packing`, else out of it.

    A parcel takes one launch. Its boxes lie relative to bases, which stay on the GPU until they change.
    """

    def __init__(
        self,
        kernel: Launcher,
        device: torch.device,
        parcels: Sequence[Sequence[Staged]],
        *,
        packing: bool,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """`check` is called before each table is made. Raises `TransportBroken` if the tables find no room."""
        self._kernel, self._device = kernel, device
        self._addresses: Ints = np.empty(0, dtype=np.int64)
        self._bases: torch.Tensor | None = None
        self._tables: list[Table] = []
        try:
            for parcel in parcels:
                check()
                self._tables.append(kernel.table(joined([_items(one, packing) for one in parcel])))
        except torch.OutOfMemoryError as error:
            raise TransportBroken(f"this GPU has no room for the tables of {len(parcels)} parcels: {error}") from error

    def begin(self, bases: Ints) -> None:
        """Set the addresses at which the mapped memory begins. No earlier launch may still be under way."""
        if self._bases is None or not np.array_equal(bases, self._addresses):
            self._bases, self._addresses = torch.from_numpy(bases).to(self._device), bases.copy()

    def launch(self, parcel: int, buffer: int, stream: torch.cuda.Stream) -> None:
        """Queue the copy of one parcel on `stream`. `buffer` is the address of its staging buffer."""
        self._kernel.launch(self._tables[parcel], COPY, stream=stream, bases=self._bases, slot=buffer, share=_SHARE)


def _items(one: Staged, packing: bool) -> Items:
    there = Place(one.base, one.at, one.strides or (0,))
    here = Place(SLOT, one.begin, one.packed or (0,))
    source, target = (there, here) if packing else (here, there)
    shape = one.shape or (1,)
    return box_items(shape, one.itemsize, source, target, tensor_shape=shape, offset=(0,) * len(shape))
