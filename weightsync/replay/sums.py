"""Fingerprints a worker's weights as they lie: by numpy in host memory, on a GPU by one launch over a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from weightsync.device.buckets import flat_sum
from weightsync.device.launch import SUM, BoxKernel
from weightsync.device.table import Place, box_items, joined
from weightsync.fingerprint import fingerprint
from weightsync.ipc.descriptors import checksum
from weightsync.replay.moves import raw_bytes, strided_view

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.replay.kernel import Launcher
    from weightsync.replay.residents import Residents

__all__ = ["HostSums", "KernelSums", "Sums", "sums_for", "tensor_checksum"]


class Sums(Protocol):
    """Fingerprints the residents of one plan and one manifest."""

    def fingerprints(self, targets: Mapping[str, torch.Tensor]) -> bytes:
        """Fingerprint what lies in `targets` now: a little-endian uint64 for each resident."""


class HostSums:
    """Fingerprints weights in host memory. Weights on a GPU, if there are any, are fetched."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents

    def fingerprints(self, targets: Mapping[str, torch.Tensor]) -> bytes:
        """See `Sums`."""
        residents = self._residents
        sums = np.empty(len(residents.held), dtype="<u8")
        for at, one in enumerate(residents.held):
            target = targets[one.target]
            sums[at] = fingerprint(
                raw_bytes(strided_view(target, one.box)).cpu().numpy(),
                itemsize=target.element_size(),
                global_shape=residents.shapes[one.tensor],
                offset=one.offset,
                shape=one.shape,
            )
        return sums.tobytes()


class KernelSums:
    """Fingerprints weights that all lie on the GPU `device`."""

    def __init__(self, kernel: Launcher, device: torch.device, residents: Residents) -> None:
        self._kernel, self._device = kernel, device
        self._names = list(dict.fromkeys(one.target for one in residents.held))
        self._count = len(residents.held)
        bases = {name: at for at, name in enumerate(self._names)}
        items = [
            box_items(
                one.shape or (1,),
                one.itemsize,
                Place(bases[one.target], one.box.offset, one.box.strides or (0,)),
                None,
                tensor_shape=residents.shapes[one.tensor] or (1,),
                offset=one.offset or (0,),
                total=at,
            )
            for at, one in enumerate(residents.held)
        ]
        self._table: Any = kernel.table(joined(items))

    def fingerprints(self, targets: Mapping[str, torch.Tensor]) -> bytes:
        """See `Sums`."""
        addresses = [targets[name].data_ptr() for name in self._names]
        bases = torch.tensor(addresses, dtype=torch.int64, device=self._device)
        totals = torch.zeros(max(1, self._count), dtype=torch.int64, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._kernel.launch(self._table, SUM, stream=stream, bases=bases, totals=totals)
        return totals.cpu().numpy()[: self._count].astype("<i8").tobytes()


def sums_for(residents: Residents, device: torch.device, targets: Mapping[str, torch.Tensor]) -> Sums:
    """Use the kernel if `device` is a GPU and all targets with residents lie there, else numpy."""
    there = all(targets[one.target].device == device for one in residents.held)
    return KernelSums(BoxKernel(device), device, residents) if there and device.type == "cuda" else HostSums(residents)


def tensor_checksum(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor's elements, made where they lie. Compare it only with others of the same device."""
    data = raw_bytes(tensor)
    if data.device.type == "cuda":
        return flat_sum(data.data_ptr(), data.numel(), data.device)
    return checksum(data.numpy().data)
