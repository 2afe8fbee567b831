"""Greatest magnitudes of blocks that several ranks have a part of: the collective of `Fp8(all_reduce=True)`.

Ranks may know different tensors (stages of a pipeline, FSDP1), so they first see whether they know the same ones and,
where not, give each other their tables. Then only tensors are reduced of which some rank has part of a block.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from weightsync.errors import SourceError
from weightsync.plan.table import TensorTable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["reduce_amax"]


def reduce_amax(amax: Mapping[str, torch.Tensor], shared: Collection[str], group: Any) -> None:
    """Raise each rank's `amax`, by tensor, to the greatest of all ranks of `group` for the same tensor.

    `shared` are tensors of which this rank has part of a block; the others' are reduced if they are shared anywhere.
    What is not finite becomes an infinity. Every rank of the group calls it; waits as long as the group's collectives
    do. Raises `SourceError` where ranks do not mean the same by a name.
    """
    from torch import distributed as dist

    # By name: a trainer may have made GPUs torch's default device.
    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else f"cuda:{torch.cuda.current_device()}")
    names = sorted(amax)
    mine = TensorTable(tuple(names), ("float32",) * len(names), tuple([tuple(amax[name].shape) for name in names]))
    shapes = _union([TensorTable.unpack(packed) for packed in _gathered(mine, device, group)])
    marked = torch.tensor([name in shared for name in shapes], dtype=torch.uint8, device=device)
    dist.all_reduce(marked, dist.ReduceOp.MAX, group=group)
    reduced = [name for name, any_shares in zip(shapes, marked.tolist(), strict=True) if any_shares]
    if not reduced:
        return
    counts = [prod(shapes[name]) for name in reduced]
    flat = torch.zeros(sum(counts), dtype=torch.float32, device=device)
    parts = dict(zip(reduced, torch.split(flat, counts), strict=True))
    for name in parts.keys() & amax.keys():
        # How a reduction compares a NaN is the backend's affair.
        parts[name].copy_(amax[name].flatten().nan_to_num(nan=torch.inf, posinf=torch.inf))
    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
    for name in parts.keys() & amax.keys():
        amax[name].copy_(parts[name].view(shapes[name]))


def _gathered(mine: TensorTable, device: torch.device, group: Any) -> list[bytes]:
    """Every rank's table, packed; one for all where they are the same."""
    from torch import distributed as dist

    packed, world = mine.pack(), dist.get_world_size(group)
    about = torch.tensor([*mine.digest, *len(packed).to_bytes(8, "little")], dtype=torch.uint8, device=device)
    every = [torch.empty_like(about) for _ in range(world)]
    dist.all_gather(every, about, group=group)
    told = [bytes(one.tolist()) for one in every]
    if len(set(told)) == 1:
        return [packed]
    lengths = [int.from_bytes(one[16:], "little") for one in told]
    room = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    room[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    tables = [torch.empty_like(room) for _ in range(world)]
    dist.all_gather(tables, room, group=group)
    return [table[:length].cpu().numpy().tobytes() for table, length in zip(tables, lengths, strict=True)]


def _union(tables: list[TensorTable]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the order of names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for table in tables:
        for name, shape in zip(table.names, table.shapes, strict=True):
            known = shapes.setdefault(name, shape)
            if known != shape:
                raise SourceError(f"tensor {name!r} has {known} blocks on one rank and {shape} on another")
    return dict(sorted(shapes.items()))
