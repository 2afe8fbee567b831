"""The collective of `Fp8(all_reduce=True)`: greatest magnitudes of blocks that several ranks hold parts of.

Ranks may know different tensors (stages of a pipeline, FSDP1). So they first compare their tables, and exchange them if
they differ. Then they reduce only tensors of which some rank has part of a block. A rank that has failed before takes
part as well and gives its reason instead of a table: then all ranks raise, and none waits.
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
    """Raise each tensor's `amax` on this rank to the greatest of all ranks of `group`.

    `shared` are tensors of which this rank has part of a block. A tensor is reduced on all ranks if it is shared on
    any; values of it that are not finite become infinity. Every rank of the group must call this. It waits as long as
    the group's collectives do. Raises `SourceError` if ranks disagree about the blocks of a tensor.

    `failure` is the reason why this rank has no `amax`. It is raised here; the other ranks raise `PushAborted`, which
    names this rank.
    """
    from torch import distributed as dist

    # Tensors below name their device, because a trainer may have made a GPU torch's default device.
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
        # Not as NaN: how a reduction compares one is up to the backend.
        parts[name].copy_(amax[name].flatten().nan_to_num(nan=torch.inf, posinf=torch.inf))
    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
    for name in parts.keys() & amax.keys():
        amax[name].copy_(parts[name].view(shapes[name]))


def _gathered(mine: TensorTable, failure: Exception | None, device: torch.device, group: Any) -> list[bytes]:
    """Return every rank's packed table, or only one if all are the same. Raises `failure`, or another rank's."""
    from torch import distributed as dist

    packed = mine.pack() if failure is None else msgspec.msgpack.encode(_record(failure))
    about = bytes([failure is not None, *mine.digest, *len(packed).to_bytes(8, "little")])
    told = _all_gather(about, [len(about)] * dist.get_world_size(group), device, group)
    failed = [rank for rank, one in enumerate(told) if one[0]]
    if not failed and len(set(told)) == 1:
        return [packed]
    # After a failure only reasons are gathered: tables are of no use any more, may be long, and memory may be short.
    lengths = [int.from_bytes(one[17:], "little") if one[0] or not failed else 0 for one in told]
    given = _all_gather(packed[: lengths[dist.get_rank(group)]], lengths, device, group)
    if failure is not None:
        raise failure
    if failed:
        raise _aborted(failed, msgspec.msgpack.decode(given[failed[0]], type=ErrorRecord))
    return given


def _all_gather(mine: bytes, lengths: list[int], device: torch.device, group: Any) -> list[bytes]:
    """Gather each rank's bytes; all ranks know all lengths."""
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
    """Return the error that ranks raise if others have failed. It is worded as the daemon's, for the first of these."""
    more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return PushAborted(f"trainer rank {failed[0]} failed: {why.message}{more}", rank=failed[0], hint=why.hint)


def _union(tables: list[TensorTable]) -> dict[str, tuple[int, ...]]:
    """Merge tables into shapes by name, in the order of names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for table in tables:
        for name, shape in zip(table.names, table.shapes, strict=True):
            known = shapes.setdefault(name, shape)
            if known != shape:
                raise SourceError(f"tensor {name!r} has {known} blocks on one rank and {shape} on another")
    return dict(sorted(shapes.items()))
