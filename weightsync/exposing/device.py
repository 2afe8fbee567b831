"""Exposes weights on this rank's GPU where they lie. Those sent in another type, or held elsewhere, are copied there.

The copy's memory is kept between pushes; each push copies anew. One launch converts and fingerprints float32 weights
that are sent as bfloat16; a second one fingerprints all others.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from weightsync.device.buckets import lent_tensor
from weightsync.device.launch import COPY, SUM, BoxKernel
from weightsync.device.table import BYTES, F32_TO_BF16, SLOT, Place, box_items, joined
from weightsync.device.waiting import await_events
from weightsync.errors import ConfigError, TransportBroken
from weightsync.ipc.allocations import Located, allocations, located, serial_of, shown
from weightsync.ipc.cuda import DeviceSlots
from weightsync.plan.boxes import packed_strides
from weightsync.plan.exposure import Exposure, Part, Region
from weightsync.processes import started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.device.table import Items
    from weightsync.filling.local import LocalWeights
    from weightsync.filling.program import Program, Write
    from weightsync.sources.base import Source

__all__ = ["DeviceExposed", "DeviceExposing"]

_ALIGN = 256  # bytes


class DeviceExposed:
    """What one rank exposes in pushes of one plan, for one GPU and weights of given strides and types."""

    def __init__(self, program: Program, local: LocalWeights, device: torch.device) -> None:
        """Call `update` next. Raises `TransportBroken` for memory that cannot be shared, and `ConfigError` if the GPU
        has no room for the copy or the tables.
        """
        self._copy: DeviceSlots | None = None
        try:
            self._prepare(program, local, device)
        except BaseException as error:
            self.close()
            if isinstance(error, torch.OutOfMemoryError):
                raise ConfigError(
                    f"GPU {device.index} has no room for what exposing weights takes: {error}",
                    hint="push with in_place=False",
                ) from error
            raise

    def _prepare(self, program: Program, local: LocalWeights, device: torch.device) -> None:
        self.kernel = BoxKernel(device)
        self._layout, self._dtypes = local.layout, local.dtypes
        self._strides, self._gpus = local.strides, local.gpus
        self._gpu = str(torch.cuda.get_device_properties(device).uuid)
        self._totals: dict[int, int] = {}  # tensor of the manifest → index of its fingerprint
        self.read: list[tuple[Write, int]] = []  # parts that the source copies, and the byte of the copy they go to
        self._tabulate(program, local)
        self._pointers: list[int] | None = None
        self._found: Located | None = None
        self.bases: torch.Tensor  # addresses of the shards
        self.totals = torch.zeros(max(1, len(self._totals)), dtype=torch.int64, device=device)
        # the totals on the host; `device` is given because a trainer may have made GPUs torch's default
        self._told = torch.empty(max(1, len(self._totals)), dtype=torch.int64, device="cpu", pin_memory=True)
        self.stream = torch.cuda.Stream(device)

    def _tabulate(self, program: Program, local: LocalWeights) -> None:
        """Make the tables that each push launches, and the exposure. `update` adds addresses."""
        device = self.kernel.device
        here, cast, read = _sorted(program, local, device)
        with torch.cuda.device(device):  # first, because it may raise: the work below would be wasted in each push
            for one in allocations([local.pointers[write.shard] for write in here]):
                shown(one, self._gpu)
        parts, summed, copied, end = [], [], [], 0
        sources = [_place(write, local) for write in here]
        for write, own in zip(here, sources, strict=True):
            parts.append(_part(write, 0, own.strides))
            summed.append(self._items(write, own, None))
        for write in (*cast, *read):
            copy = Place(SLOT, end, packed_strides(write.shape, write.itemsize))
            parts.append(_part(write, end, copy.strides))
            if len(parts) <= len(here) + len(cast):
                copied.append(self._items(write, _place(write, local), copy, op=F32_TO_BF16))
            else:
                self.read.append((write, end))
                summed.append(self._items(write, copy, None))
            end += -(-write.nbytes // _ALIGN) * _ALIGN
        if end:
            self._copy = DeviceSlots.allocate(1, end, gpu=self._gpu, device=device.index)
        self._copy_bytes = end
        pid = os.getpid()
        self.exposure = Exposure.of(pid, started(pid), [], parts, program.width)
        self._shards = np.array([own.base for own in sources], dtype=np.int64)  # of the parts exposed in place …
        self._inner = np.array([own.offset for own in sources], dtype=np.int64)  # … and the byte where each begins
        self.copied, self.summed = self.kernel.table(joined(copied)), self.kernel.table(joined(summed))

    def update(self, local: LocalWeights) -> None:
        """Take note of where the weights are now. Raises `TransportBroken` for memory that cannot be shared."""
        device = self.kernel.device
        with torch.cuda.device(device):
            if local.pointers == self._pointers and self._found is not None and self._found.current:
                return
            pointers = np.array([*local.pointers, 0], dtype=np.uint64).view(np.int64)
            found = located(pointers[self._shards] + self._inner, self._gpu)
            regions = found.regions
            if self._copy is not None:
                serial = serial_of(self.copy_address)
                handle = self._copy.memory.handle
                regions += (Region(nbytes=self._copy_bytes, gpu=self._gpu, handle=handle, serial=serial),)
        region, at = self.exposure.region.copy(), self.exposure.at.copy()
        count = len(found.at)
        region[:count], region[count:] = found.region, len(found.regions)
        at[:count] = found.at
        self.exposure = replace(self.exposure, regions=regions, region=region, at=at)
        self.bases = torch.from_numpy(pointers).to(device)
        self._pointers, self._found = local.pointers, found

    def _items(self, write: Write, source: Place, onto: Place | None, op: int = BYTES) -> Items:
        return box_items(
            write.shape,
            write.itemsize,
            source,
            onto,
            tensor_shape=write.global_shape,
            offset=write.global_offset,
            total=self._totals.setdefault(write.tensor, len(self._totals)),
            op=op,
        )

    def tell(self) -> None:
        """Queue the copy of the fingerprints to the host."""
        self._told.copy_(self.totals, non_blocking=True)

    @property
    def sums(self) -> dict[int, int]:
        """Tensor → fingerprint, once the GPU is past `tell`."""
        told = self._told.numpy().view(np.uint64).tolist()
        return {tensor: told[at] for tensor, at in self._totals.items()}

    @property
    def copy_address(self) -> int:
        """The address of the copy; 0 if there is none."""
        return self._copy.slot(0) if self._copy is not None else 0

    def fits(self, local: LocalWeights, device: torch.device) -> bool:
        """Whether this fits these weights too. If so, call `update` next."""
        if self.kernel.device != device or (local.gpus, local.strides) != (self._gpus, self._strides):
            return False
        return local.layout is self._layout or local.dtypes == self._dtypes

    def close(self) -> None:
        """Free the copy. Processes that have it mapped keep it until they are told of other memory."""
        if self._copy is not None:
            self._copy.close()


class DeviceExposing:
    """The exposing of one push: queues its work on the GPU, and watches how far it is."""

    def __init__(self, source: Source, exposed: DeviceExposed, ready: Sequence[torch.cuda.Event]) -> None:
        """`ready`: events past the kernels that compute the weights. Waits for the GPU only if the source has to copy.
        Raises `SourceError`.
        """
        self.exposure = exposed.exposure
        self._exposed = exposed
        self._readable, self._summed = torch.cuda.Event(), torch.cuda.Event()
        self.ready = False
        self.measured: dict[int, int] | None = None
        kernel, stream = exposed.kernel, exposed.stream
        with torch.cuda.device(kernel.device), torch.cuda.stream(stream):
            for event in ready:
                stream.wait_event(event)
            exposed.totals.zero_()
            for write, at in exposed.read:
                out = lent_tensor(exposed.copy_address + at, write.nbytes, kernel.device)
                source.read_into(write.shard, write.src_offset, write.shape, out.view(write.dtype).view(write.shape))
            for table, mode in ((exposed.copied, COPY | SUM), (exposed.summed, SUM)):
                kernel.launch(
                    table,
                    mode,
                    stream=stream,
                    bases=exposed.bases,
                    slot=exposed.copy_address,
                    totals=exposed.totals,
                )
                if mode & COPY:
                    self._readable.record(stream)
            exposed.tell()
            self._summed.record(stream)

    def advance(self) -> None:
        """See `Exposing`."""
        try:
            self.ready = self.ready or self._readable.query()
            if self.measured is None and self._summed.query():
                self.measured = self._exposed.sums
        except RuntimeError as error:
            raise TransportBroken(f"this rank's GPU failed while it exposed its weights: {error}") from error

    def close(self, *, deadline: float) -> None:
        """See `Exposing`."""
        try:
            await_events([self._summed], "exposing", deadline=deadline)
        except RuntimeError as error:
            raise TransportBroken(f"this rank's GPU failed while it exposed its weights: {error}") from error


def _sorted(
    program: Program, local: LocalWeights, device: torch.device
) -> tuple[list[Write], list[Write], list[Write]]:
    """Sort the parts: those exposed in place, those that the kernel converts, and those that the source copies."""
    here, cast, read = [], [], []
    for write in (write for bucket in program.writes for write in bucket):
        tensor = local.tensors[write.shard]
        if tensor is None or tensor.device != device:
            read.append(write)
        elif tensor.dtype == write.dtype:
            here.append(write)
        elif (tensor.dtype, write.dtype) == (torch.float32, torch.bfloat16):
            cast.append(write)
        else:
            read.append(write)
    return here, cast, read


def _place(write: Write, local: LocalWeights) -> Place:
    tensor = local.tensors[write.shard]
    assert tensor is not None, "it lies on this GPU"
    strides = tuple(step * tensor.element_size() for step in tensor.stride())
    return Place(write.shard, sum(at * step for at, step in zip(write.src_offset, strides, strict=True)), strides)


def _part(write: Write, at: int, strides: tuple[int, ...]) -> Part:
    return Part(write.tensor, write.global_offset, write.shape, 0, at, strides)
