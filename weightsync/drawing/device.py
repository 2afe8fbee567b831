"""Draws on a GPU: one launch of the kernel over a table, out of whichever GPUs the trainer's memory lies on."""

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

_SHARE = 2  # of a GPU's multiprocessors, the other half being left to the kernels that send and receive


class DeviceCopies:
    """Of one layout, on the GPU `device`."""

    def __init__(self, kernel: Launcher, device: torch.device, several: Sequence[Draw]) -> None:
        self._kernel, self._device = kernel, device
        counts = [0] * (1 + max((draw.rank for draw in several), default=-1))
        for draw in several:
            counts[draw.rank] = max(counts[draw.rank], 1 + draw.part)
        self._counts = counts  # parts of each rank, as far as anything is drawn of them
        firsts = [0, *accumulate(counts)]  # of these among all bases; after them come the targets
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
        self._bases: torch.Tensor | None = None  # the same on the GPU
        self._done: torch.cuda.Event | None = None  # past what was launched last

    @classmethod
    def on(cls, gpu: int, several: Sequence[Draw]) -> DeviceCopies:
        """Carried out by the kernel on this process's GPU `gpu`."""
        device = torch.device("cuda", gpu)
        return cls(BoxKernel(device), device, several)

    def run(self, targets: Sequence[int], parts: Sequence[Ints], *, deadline: float) -> None:
        """Copy, from and to the memory at these addresses, on the current stream, and wait for it; `parts` by rank.
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
        """Return when what was copied last is. Raises `TransportTimeout`."""
        if self._done is not None:
            await_events([self._done], "drawing weights", deadline=deadline)


class DeviceStaged:
    """Copies between memory at bases and a staging buffer, parcel by parcel (`weightsync/plan/delivery.py`), one launch
    each. `packing`: into the buffer; else out of it. The bases are kept on the GPU until they change.
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
        """`check` is called before each table. Raises `TransportBroken` where there is no room for them."""
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
        """What is mapped begins at these addresses. Nothing that was launched before is under way."""
        if self._bases is None or not np.array_equal(bases, self._addresses):
            self._bases, self._addresses = torch.from_numpy(bases).to(self._device), bases.copy()

    def launch(self, parcel: int, buffer: int, stream: torch.cuda.Stream) -> None:
        """Copy one parcel, from or to the staging memory at the address `buffer`, on `stream`."""
        self._kernel.launch(self._tables[parcel], COPY, stream=stream, bases=self._bases, slot=buffer, share=_SHARE)


def _items(one: Staged, packing: bool) -> Items:
    there = Place(one.base, one.at, one.strides or (0,))
    here = Place(SLOT, one.begin, one.packed or (0,))
    source, target = (there, here) if packing else (here, there)
    shape = one.shape or (1,)
    return box_items(shape, one.itemsize, source, target, tensor_shape=shape, offset=(0,) * len(shape))
