"""Decides which rank writes which box: some rank must hold each element of every tensor, and exactly one writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import PushRefused
from weightsync.plan.boxes import Ints, Words, measure, splitmix64

if TYPE_CHECKING:
    import numpy.typing as npt

    from weightsync.plan.merge import Holdings

__all__ = ["assign_fills"]

_EXPLAINED = 4096  # boxes of one tensor; an explanation compares every pair of them


def assign_fills(held: Holdings, node: Ints) -> npt.NDArray[np.int64]:
    """Choose the rows of `held` that are written, one for each distinct box; sorted.

    Boxes that several ranks hold (replicas) are assigned in canonical order, each to the holder with the fewest bytes
    so far. Ranks so stay level throughout a push, and not only at its end. `node` [ranks] is each rank's node: holders
    on node 0 come first, because bytes written there need not travel to it.

    Raises `PushRefused` naming tensor and ranks if boxes overlap or leave elements out.
    """
    order, first = _by_box(held)
    chosen = order[first]
    _check_coverage(held, chosen)
    holders = np.diff(first, append=len(order))
    if not (holders > 1).any():
        return np.sort(chosen)
    sizes = held.shape.prod(axis=1, dtype=np.int64) * held.tensors.itemsizes[held.tensor]
    alone = chosen[holders == 1]
    ranks = int(held.rank.max()) + 1
    load = np.bincount(held.rank[alone], weights=sizes[alone], minlength=ranks).astype(np.int64).tolist()
    shared = np.flatnonzero(holders > 1)
    keys = [*held.offset[chosen[shared]].T[::-1], held.tensor[chosen[shared]]]
    rank_of = held.rank[order].tolist()
    elsewhere = (node > 0).tolist()
    for box in shared[np.lexsort(keys)].tolist():
        begin = int(first[box])
        row = min(range(begin, begin + int(holders[box])), key=lambda at: (elsewhere[rank_of[at]], load[rank_of[at]]))
        chosen[box] = order[row]
        load[rank_of[row]] += int(sizes[order[row]])
    return np.sort(chosen)


def _by_box(held: Holdings) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Order the rows of `held` so that equal boxes are adjacent, lowest rank first; and say where each box begins."""
    columns = [held.tensor.astype(np.int64), *held.offset.T, *held.shape.T]
    key = np.zeros(len(held.tensor), dtype=np.uint64)
    for column in columns:
        key = splitmix64(key ^ column.astype(np.uint64))
    order = np.argsort(key, kind="stable")
    changes = _changes([key], order)
    if (changes != _changes(columns, order)).any():  # different boxes with one key: very rare, but to be got right
        order = np.lexsort(columns)
        changes = _changes(columns, order)
    return order, np.flatnonzero(changes)


def _changes(columns: list[npt.NDArray[np.int64]] | list[Words], order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mark each row that differs, in this order, from the row before it."""
    changes = np.zeros(len(order), dtype=np.bool_)
    changes[:1] = True
    for column in columns:
        sorted_column = column[order]
        changes[1:] |= sorted_column[1:] != sorted_column[:-1]
    return changes


def _check_coverage(held: Holdings, boxes: npt.NDArray[np.int64]) -> None:
    """Raise `PushRefused` unless these rows, all different boxes, tile every tensor that has elements."""
    table = held.tensors
    boxes = boxes[np.argsort(held.tensor[boxes], kind="stable")]
    tensor = held.tensor[boxes]
    present = np.flatnonzero(np.diff(tensor, prepend=-1))  # where in `boxes` each tensor begins
    covered = np.zeros(len(table), dtype=np.uint64)
    elements = np.zeros(len(table), dtype=np.int64)
    if len(boxes):
        offset, shape = held.offset[boxes], held.shape[boxes]
        covered[tensor[present]] = np.add.reduceat(measure(offset, shape, table.dims[tensor]), present)
        elements[tensor[present]] = np.add.reduceat(shape.prod(axis=1, dtype=np.int64), present)
    whole = measure(np.zeros_like(table.dims), table.dims, table.dims)
    wrong = (table.numels > 0) & ((covered != whole) | (elements != table.numels))
    if wrong.any():
        at = int(np.argmax(wrong))
        _explain(held, at, boxes[tensor == at])


def _explain(held: Holdings, at: int, boxes: npt.NDArray[np.int64]) -> None:
    """Raise a `PushRefused` that says why these boxes do not tile tensor `at`."""
    table = held.tensors
    ndim = int(table.ndims[at])
    what = f"tensor {table.names[at]!r} of shape {table.shapes[at]}"
    hint = "every element must be held by a rank; ranks may hold the same box, but no boxes that overlap otherwise"
    if len(boxes) > _EXPLAINED:
        raise PushRefused(f"{what}: its {len(boxes)} shards overlap or leave elements out", hint=hint)
    boxes = boxes[np.argsort(held.rank[boxes], kind="stable")]
    low = held.offset[boxes, :ndim]
    high = low + held.shape[boxes, :ndim]

    def described(i: int) -> str:
        return f"rank {int(held.rank[boxes[i]])} holds {_box(low[i], high[i] - low[i])}"

    for i in range(len(boxes)):
        overlap = ((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i])).all(axis=1)
        if overlap.any():
            j = i + 1 + int(np.argmax(overlap))
            raise PushRefused(
                f"{what}: {described(i)} and {described(j)}, which overlap", rank=int(held.rank[boxes[j]]), hint=hint
            )
    missing = table.numel(at) - int((high - low).prod(axis=1).sum())
    shown = "; ".join(described(i) for i in range(min(len(boxes), 4))) or "no rank holds any part of it"
    more = f"; and {len(boxes) - 4} more" if len(boxes) > 4 else ""
    first = _first_gap(low, high, table.dims[at, :ndim])
    raise PushRefused(
        f"{what}: {missing} elements, the first at {tuple(first)}, are held by no rank ({shown}{more})", hint=hint
    )


def _box(offset: Ints, shape: Ints) -> str:
    return f"shape {tuple(shape.tolist())} at offset {tuple(offset.tolist())}"


def _first_gap(low: Ints, high: Ints, dims: Ints) -> list[int]:
    """Return the first element, in row-major order, that lies in none of the boxes [low, high).

    The boxes do not overlap, and leave at least one element out.
    """
    point = np.zeros(len(dims), dtype=np.int64)
    reach = dims.copy()  # how far each coordinate may jump without passing the end of a box
    while (inside := ((low <= point) & (point < high)).all(axis=1)).any():
        box = int(np.argmax(inside))
        reach = np.minimum(reach, high[box])
        d = len(dims) - 1
        point[d] = high[box, d]
        while d > 0 and point[d] >= dims[d]:
            point[d], reach[d] = 0, dims[d]
            d -= 1
            point[d], reach[d] = reach[d], dims[d]
    return [int(x) for x in point]
