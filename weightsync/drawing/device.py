"""Draws on a GPU: one launch of the kernel over a table, out of whichever GPUs the trainer's memory lies on."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightsync.device.launch import COPY, BoxKernel
from weightsync.device.table import Place, box_items, joined
from weightsync.device.waiting import await_events

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.draws import Draw
    from weightsync.replay.kernel import Launcher

__all__ = ["DeviceCopies"]


class DeviceCopies:
    """Of one layout, on the GPU `device`."""

    def __init__(self, kernel: Launcher, device: torch.device, several: Sequence[Draw]) -> None:
        self._kernel, self._device = kernel, device
        regions = [1 + max((d.region for d in several if d.rank == rank), default=-1) for rank in _ranks(several)]
        self._firsts = [0, *accumulate(regions)]  # of each rank's regions among all; then come the targets
        self._targets = 1 + max((draw.target for draw in several), default=-1)
        onto = self._firsts[-1]
        items = [
            box_items(
                draw.shape or (1,),
                draw.itemsize,
                Place(self._firsts[draw.rank] + draw.region, draw.source, draw.source_strides or (0,)),
                Place(onto + draw.target, draw.at, draw.strides or (0,)),
                tensor_shape=draw.shape or (1,),
                offset=(0,) * max(1, len(draw.shape)),
            )
            for draw in several
        ]
        self._table = kernel.table(joined(items))
        self._addresses: list[int] = []
        self._bases: torch.Tensor | None = None  # the same on the GPU

    @classmethod
    def on(cls, gpu: int, several: Sequence[Draw]) -> DeviceCopies:
        """Carried out by the kernel on this process's GPU `gpu`."""
        device = torch.device("cuda", gpu)
        return cls(BoxKernel(device), device, several)

    def run(self, targets: Sequence[int], regions: Sequence[Sequence[int]], *, deadline: float) -> None:
        """Copy, from and to the memory at these addresses, on the current stream, and wait for it; `regions` by rank.
        Raises `TransportTimeout`.
        """
        counts = [after - first for first, after in zip(self._firsts, self._firsts[1:], strict=False)]
        addresses = [at for count, rank in zip(counts, regions, strict=False) for at in rank[:count]]
        addresses += targets[: self._targets]
        if self._bases is None or addresses != self._addresses:
            packed = np.array(addresses or [0], dtype=np.uint64).view(np.int64)
            self._bases, self._addresses = torch.from_numpy(packed).to(self._device), addresses
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._kernel.launch(self._table, COPY, stream=stream, bases=self._bases)
        if stream is not None:
            await_events([stream], "drawing weights", deadline=deadline)


def _ranks(several: Sequence[Draw]) -> range:
    return range(1 + max((draw.rank for draw in several), default=-1))
