"""Tables of boxes on a GPU, and launches of the kernel over them.

    kernel = BoxKernel(torch.device("cuda", 0))
    table = kernel.table(items)                       # once for a layout
    kernel.launch(table, COPY | SUM, bases=…, slot=…, totals=…, stream=…, share=…)

A launch returns at once. Its arguments must stay alive until its stream is past it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from weightsync.ipc.cuda import cupy

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["COPY", "SUM", "BoxKernel", "Table"]

COPY, SUM = 1, 2
_THREADS = 512
_RESIDENT = 2  # blocks of the kernel that a multiprocessor holds at a time, see its launch bounds


class Table(NamedTuple):
    """Items on a GPU."""

    data: torch.Tensor  # uint8 [items * 80]
    items: int


class _Handle:
    """A torch stream, in the protocol that CUDA libraries share (`__cuda_stream__`: version and address)."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.stream.cuda_stream


def _same(stream: torch.cuda.Stream) -> Any:
    """Return `stream` for cupy: version 13 has no `from_external`, and 14 warns of `ExternalStream`."""
    streams = cupy().cuda
    if hasattr(streams.Stream, "from_external"):
        return streams.Stream.from_external(_Handle(stream))
    return streams.ExternalStream(stream.cuda_stream, stream.device_index)


@cache
def _compiled(source: str) -> Any:
    return cupy().RawKernel(source, "boxes", options=("--std=c++17",))


class BoxKernel:
    """The kernel on one GPU."""

    def __init__(self, device: torch.device) -> None:
        """Compiles the kernel, once per process. The first time on a machine takes half a second."""
        self.device = device
        self._kernel = _compiled(Path(__file__).with_name("boxes.cu").read_text())
        self._blocks = _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count

    def table(self, items: npt.NDArray[Any]) -> Table:
        """Copy the items to this GPU."""
        data = torch.from_numpy(items.view(np.uint8).copy()).to(self.device)
        return Table(data, len(items))

    def launch(
        self,
        table: Table,
        mode: int,
        *,
        stream: torch.cuda.Stream,
        bases: torch.Tensor | None = None,
        slot: int = 0,
        totals: torch.Tensor | None = None,
        share: int = 1,
    ) -> None:
        """Work on the whole table, on `stream`. `bases` and `totals` are int64 on this GPU; `slot` is an address.

        `share` launches run side by side. Each takes its part of the multiprocessors, so that traffic to several peers
        flows at once.
        """
        if not table.items:
            return
        blocks = min(table.items, max(1, self._blocks // share))
        c = cupy()
        with c.cuda.Device(self.device.index), _same(stream):
            self._kernel(
                (blocks,),
                (_THREADS,),
                (
                    np.uint64(table.data.data_ptr()),
                    np.uint32(table.items),
                    np.uint64(bases.data_ptr() if bases is not None else 0),
                    np.uint64(slot),
                    np.uint64(totals.data_ptr() if totals is not None else 0),
                    np.uint32(mode),
                ),
            )
