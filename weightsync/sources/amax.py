"""Greatest magnitudes of blocks that several ranks have a part of: the collective of `Fp8(all_reduce=True)`.

Ranks may know different tensors (stages of a pipeline, FSDP1), so they first see whether they know the same ones and,
where not, give each other their tables. Then only tensors are reduced of which some rank has part of a block. A rank
that has failed before takes part as well and gives its reason instead of a table: all raise then, and none waits.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from weightsync.errors import ErrorRecord, PushAborted, SourceError, WeightSyncError
from weightsync.plan.table import TensorTable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["reduce_amax"]


def reduce_amax(
    amax: Mapping[str, torch.Tensor], shared: Collection[str], group: Any, failure: Exception | None = None
) -> None:
    """Raise each rank's `amax`, by tensor, to the greatest of all ranks of `group` for the same tensor.

    `shared` are tensors of which this rank has part of a block; the others' are reduced if they are shared anywhere.
    What is not finite becomes an infinity. Every rank of the group calls it; waits as long as the group's collectives
    do. Raises `SourceError` where ranks do not mean the same by a name.

    `failure` is why this rank has no `amax` to give. Raised here; on the others `PushAborted` that names this rank.
    """
    from torch import distributed as dist

    # By name: a trainer may have made GPUs torch's default device.
    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else f"cuda:{torch.cuda.current_device()}")
    names = sorted(amax)
    mine = TensorTable(tuple(names), ("float32",) * len(names), tuple([tuple(amax[name].shape) for name in names]))
    shapes = _union([TensorTable.unpack(packed) for packed in _gathered(mine, failure, device, group)])
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


def _gathered(mine: TensorTable, failure: Exception | None, device: torch.device, group: Any) -> list[bytes]:
    """Every rank's table, packed; one for all where they are the same. Raises `failure`, or another rank's."""
    from torch import distributed as dist

    packed = mine.pack() if failure is None else msgspec.msgpack.encode(_record(failure))
    about = bytes([failure is not None, *mine.digest, *len(packed).to_bytes(8, "little")])
    told = _all_gather(about, [len(about)] * dist.get_world_size(group), device, group)
    failed = [rank for rank, one in enumerate(told) if one[0]]
    if not failed and len(set(told)) == 1:
        return [packed]
    # After a failure there may be little memory: the others' tables, which may be long, are no use any more.
    lengths = [int.from_bytes(one[17:], "little") if one[0] or not failed else 0 for one in told]
    given = _all_gather(packed[: lengths[dist.get_rank(group)]], lengths, device, group)
    if failure is not None:
        raise failure
    if failed:
        raise _aborted(failed, msgspec.msgpack.decode(given[failed[0]], type=ErrorRecord))
    return given


def _all_gather(mine: bytes, lengths: list[int], device: torch.device, group: Any) -> list[bytes]:
    """What each rank gives, of the lengths that all know."""
    from torch import distributed as dist

    room = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    if mine:
        room[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    every = [torch.empty_like(room) for _ in lengths]
    dist.all_gather(every, room, group=group)
    return [one[:length].cpu().numpy().tobytes() for one, length in zip(every, lengths, strict=True)]


def _record(failure: Exception) -> ErrorRecord:
    return (failure if isinstance(failure, WeightSyncError) else SourceError(repr(failure))).record()


def _aborted(failed: list[int], why: ErrorRecord) -> PushAborted:
    """What ranks that have not failed raise: as the daemon says it of the first that has."""
    more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return PushAborted(f"trainer rank {failed[0]} failed: {why.message}{more}", rank=failed[0], hint=why.hint)


def _union(tables: list[TensorTable]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the order of names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for table in tables:
        for name, shape in zip(table.names, table.shapes, strict=True):
            known = shapes.setdefault(name, shape)
            if known != shape:
                raise SourceError(f"tensor {name!r} has {known} blocks on one rank and {shape} on another")
    return dict(sorted(shapes.items()))
