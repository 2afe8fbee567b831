"""Fills slots on GPUs: one launch per bucket copies this rank's parts into the owner's slot and fingerprints them.

Each owner has its own stream here, so that writes to all owners overlap and no link waits for another. The kernel reads
this rank's GPU alone, and converts only float32 to bfloat16. All other parts are staged: first copied to this GPU, one
bucket's parts at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from weightsync.device.launch import COPY, SUM, BoxKernel, Table
from weightsync.device.table import BYTES, F32_TO_BF16, SLOT, Place, box_items, joined
from weightsync.device.waiting import await_events
from weightsync.errors import ConfigError, TransportBroken
from weightsync.filling.program import Filled
from weightsync.plan.boxes import packed_strides

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightsync.filling.local import LocalWeights
    from weightsync.filling.program import Program, Write
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.sources.base import Source

__all__ = ["DeviceFill", "DeviceProgram", "rank_device"]


def rank_device(local: LocalWeights) -> torch.device:
    """Return the GPU that this rank fills from: the first one with weights, else the current one.

    Raises `ConfigError` if torch sees no GPU.
    """
    for tensor in local.tensors:
        if tensor is not None and tensor.is_cuda:
            return tensor.device
    if not torch.cuda.is_available():
        raise ConfigError(
            f"this node's slots lie on GPUs, and this process's torch ({torch.__version__}) sees none",
            hint='give the trainer a GPU of the node, or set arena.device = "cpu" in the node config',
        )
    return torch.device("cuda", torch.cuda.current_device())


class _Bucket(NamedTuple):
    """One bucket of a program, on the GPU."""

    table: Table
    staged: tuple[Write, ...]  # parts that are copied to this GPU first; their bases follow the shards', in this order
    tensors: tuple[int, ...]  # of the manifest; their sums are in the totals from `first` on, in this order
    first: int
    nbytes: int


class DeviceProgram:
    """A program compiled for one GPU and for weights of given strides and types; reused while these stay the same."""

    def __init__(self, program: Program, local: LocalWeights, device: torch.device) -> None:
        self.kernel = BoxKernel(device)
        self.buckets: list[_Bucket] = []
        self.sums = 0
        self._layout, self._dtypes = local.layout, local.dtypes
        self._strides, self._gpus = local.strides, local.gpus
        for writes in program.writes:
            self.buckets.append(self._bucket(writes, local.tensors, device))
            self.sums += len(self.buckets[-1].tensors)
        self.totals = torch.zeros(max(1, self.sums), dtype=torch.int64, device=device)
        # the totals on the host; `device` is given because a trainer may have made GPUs torch's default
        self.told = torch.empty(max(1, self.sums), dtype=torch.int64, device="cpu", pin_memory=True)
        self.pointers = local.pointers
        self.bases = _addresses(local.pointers, device)

    def fits(self, local: LocalWeights, device: torch.device) -> bool:
        """Whether the program fits these weights too. If so, call `update` next."""
        if self.kernel.device != device or local.gpus != self._gpus or local.strides != self._strides:
            return False
        return local.layout is self._layout or local.dtypes == self._dtypes

    def update(self, local: LocalWeights) -> None:
        """Take note of where the weights are now."""
        if local.pointers != self.pointers:
            self.pointers, self.bases = local.pointers, _addresses(local.pointers, self.kernel.device)

    def _bucket(self, writes: Sequence[Write], locals_: Sequence[torch.Tensor | None], device: torch.device) -> _Bucket:
        tensors = {tensor: at for at, tensor in enumerate(dict.fromkeys(write.tensor for write in writes))}
        staged: list[Write] = []
        parts = []
        for write in writes:
            local = locals_[write.shard]
            op = BYTES
            if local is not None and local.device == device and local.dtype == torch.float32:
                op = F32_TO_BF16 if write.dtype == torch.bfloat16 else BYTES
            if local is None or local.device != device or (op == BYTES and local.dtype != write.dtype):
                src = Place(len(locals_) + len(staged), 0, packed_strides(write.shape, write.itemsize))
                staged.append(write)
                op = BYTES
            else:
                strides = tuple(step * local.element_size() for step in local.stride())
                src = Place(write.shard, _inner(write.src_offset, strides), strides)
            steps = packed_strides(write.piece_shape, write.itemsize)
            parts.append(
                box_items(
                    write.shape,
                    write.itemsize,
                    src,
                    Place(SLOT, write.begin + _inner(write.dst_offset, steps), steps),
                    tensor_shape=write.global_shape,
                    offset=write.global_offset,
                    total=self.sums + tensors[write.tensor],
                    op=op,
                )
            )
        table = self.kernel.table(joined(parts))
        return _Bucket(table, tuple(staged), tuple(tensors), self.sums, sum(write.nbytes for write in writes))


@dataclass
class _UnderWay:
    bucket: int
    event: torch.cuda.Event
    kept: list[torch.Tensor] = field(default_factory=list)  # memory that the launch reads


class DeviceFill:
    """The filling of one push. `begin` queues a bucket; `finished` yields buckets that have become full."""

    def __init__(
        self,
        source: Source,
        program: DeviceProgram,
        slots: Sequence[DeviceSlots],
        ready: Sequence[torch.cuda.Event],
    ) -> None:
        """`slots`: each bridge's, mapped on the program's GPU. `ready`: events past the computation of the weights."""
        device = program.kernel.device
        self._source, self._program, self._slots = source, program, slots
        self._streams = _streams(device, len(slots))
        self._under_way: list[_UnderWay] = []
        with torch.cuda.device(device), torch.cuda.stream(self._streams[0]):
            program.totals.zero_()
            prepared = torch.cuda.Event()
            prepared.record(self._streams[0])
        for stream in self._streams:
            for event in (prepared, *ready):
                stream.wait_event(event)

    @property
    def busy(self) -> bool:
        """Whether a bucket was begun that `finished` has not yielded."""
        return bool(self._under_way)

    def begin(self, bucket: int, bridge: int, slot: int) -> None:
        """Queue the writing of this rank's parts of a bucket into a slot. Waits for the GPU only to stage parts.

        Raises `SourceError`.
        """
        what, stream = self._program.buckets[bucket], self._streams[bridge]
        device = self._program.kernel.device
        under_way = _UnderWay(bucket, torch.cuda.Event())
        with torch.cuda.device(device), torch.cuda.stream(stream):
            bases = self._program.bases
            if what.staged:
                under_way.kept = [self._staged(write, device) for write in what.staged]
                bases = _addresses([*self._program.pointers, *(t.data_ptr() for t in under_way.kept)], device)
                under_way.kept.append(bases)
            self._program.kernel.launch(
                what.table,
                COPY | SUM,
                stream=stream,
                bases=bases,
                slot=self._slots[bridge].slot(slot),
                totals=self._program.totals,
                share=len(self._streams),
            )
            mine = slice(what.first, what.first + len(what.tensors))
            self._program.told[mine].copy_(self._program.totals[mine], non_blocking=True)
            under_way.event.record(stream)
        self._under_way.append(under_way)

    def finished(self) -> Iterator[Filled]:
        """Yield each bucket once it is full. Raises errors of the GPU."""
        for one in [one for one in self._under_way if one.event.query()]:
            self._under_way.remove(one)
            what = self._program.buckets[one.bucket]
            sums = self._program.told[what.first : what.first + len(what.tensors)].numpy().view(np.uint64).tolist()
            yield Filled(one.bucket, what.nbytes, dict(zip(what.tensors, sums, strict=True)))

    def close(self, *, deadline: float) -> None:
        """Wait for everything queued on the GPU. Slots and weights may change or be freed afterwards.

        Raises `TransportTimeout`, or `TransportBroken` for an error of the GPU.
        """
        try:
            await_events(self._streams, "filling", deadline=deadline)
        except RuntimeError as error:
            raise TransportBroken(f"this rank's GPU failed while it filled slots: {error}") from error
        self._under_way.clear()

    def _staged(self, write: Write, device: torch.device) -> torch.Tensor:
        """Copy one part to this GPU, in the type in which it is sent."""
        part = torch.empty(write.shape, dtype=write.dtype, device=device)
        self._source.read_into(write.shard, write.src_offset, write.shape, part)
        return part


_STREAMS: dict[torch.device, list[torch.cuda.Stream]] = {}


def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Return one stream for each of `count` owners. This process makes each stream once."""
    known = _STREAMS.setdefault(device, [])
    while len(known) < count:
        known.append(torch.cuda.Stream(device))
    return known[:count]


def _addresses(pointers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(pointers or [0], dtype=np.uint64).view(np.int64)).to(device)


def _inner(offset: Sequence[int], strides: Sequence[int]) -> int:
    return sum(at * step for at, step in zip(offset, strides, strict=True))
