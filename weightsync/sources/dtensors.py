"""Works out which boxes of a DTensor this rank holds, and where they lie in its local data."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

from weightsync.errors import SourceError

if TYPE_CHECKING:
    import torch
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

__all__ = ["Box", "dtensor_boxes", "is_dtensor"]

_Run = tuple[int, int]  # first index in the global dimension, length


class Box(NamedTuple):
    """A box of a tensor, in elements."""

    start: tuple[int, ...]  # in the local data
    offset: tuple[int, ...]  # in the global tensor
    shape: tuple[int, ...]


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor.

    Does not import torch.distributed.tensor, which takes a second: a process that has a DTensor has imported it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def dtensor_boxes(name: str, tensor: DTensor) -> tuple[torch.Tensor, list[Box]]:
    """Return the local data and the boxes in it: one for plain shards, several if strided shards leave gaps.

    torch's `compute_local_shape_and_global_offset` is not used: it makes an index tensor as long as the dimension for
    each parameter, and gives only the first offset. The result is checked against the local data. Call this without
    gradients. Raises `SourceError` naming the tensor if its placements do not say what lies where.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    local = tensor.to_local()
    if type(local).__name__ == "AsyncCollectiveTensor":
        local = cast("AsyncCollectiveTensor", local).wait()
    none = (0,) * tensor.dim()
    if coordinate is None:  # this rank is not in the tensor's mesh and holds none of it
        return local.new_empty(none), [Box(none, none, none)] if none else []
    order = getattr(getattr(tensor, "_spec", None), "shard_order", None) or ()  # newer torch may have it
    if any(list(entry.mesh_dims) != sorted(entry.mesh_dims) for entry in order):
        raise SourceError(
            f"tensor {name!r} is cut in another order than that of its mesh's dimensions: {order}",
            hint="redistribute it in the order of the dimensions first",
        )
    runs: list[list[_Run]] = [[(0, length)] for length in tensor.shape]
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        shard: Any = placement
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard"):
            partial = placement.is_partial()
            raise SourceError(
                f"tensor {name!r} has placement {placement}: "
                + ("its value is a sum over ranks" if partial else "where its parts lie is unknown"),
                hint="redistribute it to Shard or Replicate first",
            )
        dim, chunks, mine = shard.dim, tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim]
        splits = shard.split_factor if kind == "_StridedShard" else 1
        length = sum(count for _, count in runs[dim])
        if splits > 1 and length % (splits * chunks):
            raise SourceError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} is sharded unevenly: {placement}, {chunks} ranks",
                hint="parts of tensor-parallel parameters must be equal",
            )
        # Like torch.chunk: the size of chunks is rounded up, so the last ones are shorter or empty. A strided shard is
        # cut into `splits` first, and each split into `chunks`.
        outer = -(-length // splits)
        inner = -(-outer // chunks)
        picked = []
        for first in range(0, splits * outer, outer or 1):
            end = min(first + outer, length)
            picked += _cut_runs(runs[dim], min(first + mine * inner, end), min(first + (mine + 1) * inner, end))
        runs[dim] = picked
    held = tuple(sum(count for _, count in dim) for dim in runs)
    if held != tuple(local.shape) and (0 not in held or local.numel()):
        raise SourceError(
            f"tensor {name!r} has local data of shape {tuple(local.shape)} where its placements "
            f"{tuple(map(str, tensor.placements))} leave {held}"
        )
    if 0 in held:
        return local.new_empty(held), [Box(none, none, held)]
    boxes = []
    for run in itertools.product(*map(_joined, runs)):  # one run of each dimension
        boxes.append(Box(tuple(r[0] for r in run), tuple(r[1] for r in run), tuple(r[2] for r in run)))  # noqa: PERF401
    return local, boxes


def _cut_runs(runs: list[_Run], begin: int, end: int) -> list[_Run]:
    """Return the part [begin, end) of these runs, taken end to end."""
    cut: list[_Run] = []
    at = 0
    for start, length in runs:
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            cut.append((start + low - at, high - low))
        at += length
    return cut


def _joined(runs: list[_Run]) -> list[tuple[int, int, int]]:
    """Return each run's place in the local data, place in the global dimension, and length; neighbours are joined."""
    joined: list[tuple[int, int, int]] = []
    at = 0
    for start, length in runs:
        if joined and joined[-1][1] + joined[-1][2] == start:
            joined[-1] = (*joined[-1][:2], joined[-1][2] + length)
        else:
            joined.append((at, start, length))
        at += length
    return joined
