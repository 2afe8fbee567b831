"""The plan of a push: tensors cut into pieces, pieces laid into buckets, and the ranks that fill them.

    plan = plan_push(layouts, slot_bytes=512 << 20, owners=8)

The manifest depends only on the tensors, `slot_bytes`, `owners` and `alignment`; the order in which ranks list tensors
does not matter. The ranks' fills also depend on their layouts and nodes. Planning is vectorised: a million shards take
seconds. Callers should cache plans by all arguments, with layouts told apart by their digests.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import PushRefused
from weightsync.plan.boxes import Ints, row_strides
from weightsync.plan.coverage import assign_fills
from weightsync.plan.fused import layer_key
from weightsync.plan.manifest import MAX_PIECES, Layout, Manifest, TensorTable
from weightsync.plan.merge import merge_layouts
from weightsync.plan.parts import Overlaps, overlaps
from weightsync.plan.runs import shares_by_bucket

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from weightsync.plan.shares import Share

__all__ = ["Plan", "plan_push"]

LAYER_FILL = 0.75  # see `_share_out`


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that follows from the arguments of `plan_push`: equal arguments give an equal plan."""

    manifest: Manifest
    fills: tuple[npt.NDArray[np.int32], ...]  # by rank: shards that it writes, sorted; one rank writes each replica
    fillers: tuple[tuple[int, ...], ...]  # by bucket: ranks that write at least a byte of it; never empty
    shares: tuple[tuple[Share, ...], ...]  # by bucket: what each node's ranks write; empty if node 0's write everything


def plan_push(
    layouts: Sequence[Layout], *, slot_bytes: int, owners: int, alignment: int = 256, nodes: Sequence[int] = ()
) -> Plan:
    """Plan a push of these layouts into slots of `slot_bytes`. `owners` bridges assemble the buckets in turn.

    Pieces start at multiples of `alignment` bytes, which should be a multiple of 8. `nodes` gives the node of each
    rank; if it is empty, all are on node 0. If ranks of several nodes hold the same box, one of node 0's writes it.

    Raises `PushRefused` if ranks disagree about a tensor, if boxes overlap or leave elements out, or if a slot is too
    small for tensors that must stay together.
    """
    if not layouts or slot_bytes < 1 or owners < 1 or alignment < 1:
        raise ValueError("a plan needs at least one rank and positive slot_bytes, owners and alignment")
    held = merge_layouts(layouts)
    node = np.asarray(nodes if len(nodes) else [0] * len(layouts), dtype=np.int64)
    rows = assign_fills(held, node)
    manifest = _manifest(held.tensors, held.group_first, slot_bytes, owners, alignment)
    bounds = np.searchsorted(held.rank[rows], np.arange(len(layouts) + 1))
    fills = tuple(held.shard[rows[a:b]] for a, b in pairwise(bounds))
    for fill in fills:
        fill.flags.writeable = False
    met = overlaps(manifest, held.tensor[rows], held.offset[rows], held.shape[rows])
    rank = held.rank[rows][met.box]
    return Plan(
        manifest=manifest,
        fills=fills,
        fillers=_fillers(manifest, met, rank, len(layouts)),
        shares=shares_by_bucket(manifest, met, node[rank]) if node[rank].any() else (),
    )


def _fillers(manifest: Manifest, met: Overlaps, rank: npt.NDArray[np.int32], ranks: int) -> tuple[tuple[int, ...], ...]:
    pairs = np.unique(manifest.piece_bucket[met.piece] * ranks + rank)
    begins = np.searchsorted(pairs, np.arange(manifest.buckets + 1) * ranks).tolist()
    who = (pairs % ranks).tolist()
    return tuple(tuple(who[a:b]) for a, b in pairwise(begins))


def _manifest(table: TensorTable, group_first: Ints, slot_bytes: int, owners: int, alignment: int) -> Manifest:
    _check_groups(table, group_first, slot_bytes, alignment)
    tensor, start, count = _cut(table, slot_bytes)
    begin, end = _laid_out(count * table.itemsizes[tensor], alignment)
    atom_first = _atoms(table, group_first, slot_bytes, tensor)
    atom_end = np.append(atom_first[1:], len(tensor))[: len(atom_first)]
    atom_buckets = _share_out(table, tensor[atom_first], begin[atom_first], end[atom_end - 1], slot_bytes)
    first = np.append(atom_first, len(tensor))[atom_buckets]  # in pieces
    base = begin[first[:-1]]
    return Manifest(
        tensors=table,
        piece_tensor=tensor,
        piece_start=start,
        piece_count=count,
        piece_offset=begin - np.repeat(base, np.diff(first)),
        bucket_first=first,
        bucket_nbytes=end[first[1:] - 1] - base,
        bucket_owner=np.arange(len(base), dtype=np.int32) % owners,
        alignment=alignment,
    )


def _laid_out(sizes: Ints, alignment: int) -> tuple[Ints, Ints]:
    """Return first byte and end of each size when all are laid one after the other, aligned, into one endless slot."""
    padded = -(-sizes // alignment) * alignment
    begin = np.cumsum(padded) - padded
    return begin, begin + sizes


def _check_groups(table: TensorTable, group_first: Ints, slot_bytes: int, alignment: int) -> None:
    """Raise `PushRefused` if each tensor of a fused group fits into a slot, but the group does not."""
    if not len(table):
        return
    begin, end = _laid_out(table.sizes, alignment)
    extent = np.maximum.reduceat(np.where(table.sizes > 0, end, 0), group_first) - begin[group_first]
    largest = np.maximum.reduceat(table.sizes, group_first)
    if not (wrong := (largest <= slot_bytes) & (extent > slot_bytes)).any():
        return
    need = slot_bytes
    while (unfit := (largest <= need) & (extent > need)).any():  # a larger slot may have to hold further groups whole
        need = int(extent[unfit].max())
    group = int(np.argmax(wrong))
    names = ", ".join(table.names[int(group_first[group]) : int(np.append(group_first, len(table))[group + 1])])
    raise PushRefused(
        f"engines fuse {names}: they must travel in one bucket and need {int(extent[group])} bytes; a slot has "
        f"{slot_bytes}",
        hint=f"raise arena.slot_bytes to at least {need}",
    )


def _cut(table: TensorTable, slot_bytes: int) -> tuple[npt.NDArray[np.int32], Ints, Ints]:
    """Return the tensor, first element and element count of every piece.

    A tensor that fits into a slot is one piece; an empty tensor has none. A larger tensor is cut along dimension 0 into
    as few pieces as possible, of equally many rows except for the last. If not even one row fits, each row is cut in
    the same way.
    """
    whole = np.flatnonzero((table.sizes > 0) & (table.sizes <= slot_bytes))
    tensors, starts, counts = [whole], [np.zeros(len(whole), dtype=np.int64)], [table.numels[whole]]
    large = np.flatnonzero(table.sizes > slot_bytes)
    pieces = len(whole)
    all_steps = row_strides(table.dims[large]).tolist()
    for at, dims, steps in zip(large.tolist(), table.dims[large].tolist(), all_steps, strict=True):
        room = slot_bytes // int(table.itemsizes[at])  # elements
        level = next((d for d, step in enumerate(steps) if step <= room), None)
        if level is None:
            raise PushRefused(
                f"a slot of {slot_bytes} bytes does not hold one element of tensor {table.names[at]!r}, "
                f"{table.dtypes[at]} of shape {table.shapes[at]}",
                hint="raise arena.slot_bytes",
            )
        length, step = dims[level], steps[level]
        cuts = -(-length // (room // step))
        outer = table.numel(at) // (length * step)
        pieces += outer * cuts
        if pieces > MAX_PIECES:
            raise PushRefused(
                f"slots of {slot_bytes} bytes would cut these tensors into more than {MAX_PIECES} pieces",
                hint="raise arena.slot_bytes",
            )
        cut = np.arange(0, length, -(-length // cuts), dtype=np.int64)
        start = np.arange(outer, dtype=np.int64)[:, None] * (length * step) + cut * step
        tensors.append(np.full(start.size, at, dtype=np.int64))
        starts.append(start.reshape(-1))
        counts.append(np.tile(np.diff(cut, append=length) * step, outer))
    tensor, start, count = np.concatenate(tensors), np.concatenate(starts), np.concatenate(counts)
    order = np.argsort(tensor, kind="stable")
    return tensor[order].astype(np.int32), start[order], count[order]


def _atoms(table: TensorTable, group_first: Ints, slot_bytes: int, tensor: npt.NDArray[np.int32]) -> Ints:
    """Return the first piece of each atom, which stays in one bucket.

    An atom is a fused group; or a single piece, if a tensor of its group does not fit into a slot.
    """
    group_of = np.repeat(np.arange(len(group_first)), np.diff(group_first, append=len(table)))
    loose = np.zeros(len(group_first), dtype=np.bool_)
    loose[group_of[table.sizes > slot_bytes]] = True
    group = group_of[tensor]
    return np.flatnonzero((np.diff(group, prepend=-1) != 0) | loose[group])


def _share_out(
    table: TensorTable, tensor: npt.NDArray[np.int32], begin: Ints, end: Ints, slot_bytes: int
) -> npt.NDArray[np.int64]:
    """Return the first atom of each bucket and, as the last entry, the number of atoms.

    A bucket takes atoms in order while they fit. If it would then end inside a layer, and is at least three quarters
    (`LAYER_FILL`) full without that layer, it ends before the layer instead. Engines so meet layers whole, at the cost
    of at most a quarter of a slot.
    """
    if not len(tensor):
        return np.zeros(1, dtype=np.int64)
    begins, ends = begin.tolist(), end.tolist()
    if ends[-1] <= slot_bytes:
        return np.array([0, len(begins)])
    layers = [layer_key(table.names[i]) for i in tensor.tolist()]
    layer_begins = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1]]
    firsts = [0]
    while (first := firsts[-1]) < len(begins):
        after = bisect_right(ends, begins[first] + slot_bytes, lo=first)
        if after < len(begins):
            place = bisect_right(layer_begins, after) - 1
            layer = layer_begins[place] if place >= 0 else 0
            if layer > first and ends[layer - 1] - begins[first] >= LAYER_FILL * slot_bytes:
                after = layer
        firsts.append(after)
    return np.array(firsts, dtype=np.int64)
