"""Arithmetic of boxes over many tensors at once. Pure numpy.

Shapes and offsets of n tensors or shards are rows of int64 arrays [n, D]; a tensor with fewer than D dimensions has its
unused, trailing dimensions filled with 1 (shapes) or 0 (offsets), which changes neither its elements nor their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Ints",
    "Words",
    "as_tuples",
    "box_runs",
    "flat_boxes",
    "measure",
    "packed_strides",
    "pad_shapes",
    "padded_width",
    "row_strides",
    "splitmix64",
]

Ints: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def splitmix64(index: Words) -> Words:
    """The index-th output (from 0) of the splitmix64 generator seeded with 0; any shape, arithmetic mod 2^64."""
    z = (index + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    mixed: Words = z ^ (z >> np.uint64(31))
    return mixed


def pad_shapes(shapes: Sequence[tuple[int, ...]], width: int, fill: int) -> Ints:
    """Turn tuples of at most `width` ints into the rows of an array [n, width], padded with `fill`."""
    rows = np.full((len(shapes), width), fill, dtype=np.int64)
    by_length: dict[int, list[int]] = {}
    for i, shape in enumerate(shapes):
        by_length.setdefault(len(shape), []).append(i)
    for length, where in by_length.items():
        if length:
            rows[where, :length] = [shapes[i] for i in where]
    return rows


def as_tuples(rows: Ints, ndims: npt.NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """Return the first `ndims[i]` numbers of each row [n, D] as a tuple; equal tuples are one object."""
    tuples: list[tuple[int, ...]] = [()] * len(rows)
    same: dict[tuple[int, ...], tuple[int, ...]] = {}
    for ndim in np.unique(ndims[ndims > 0]).tolist():
        where = np.flatnonzero(ndims == ndim)
        columns = rows[where, :ndim].T.tolist()
        for i, row in zip(where.tolist(), zip(*columns, strict=True), strict=True):
            tuples[i] = same.setdefault(row, row)
    return tuples


def padded_width(rows: Ints, width: int, fill: int) -> Ints:
    """Append columns of `fill` to `rows` [n, D] until there are `width` columns."""
    if rows.shape[1] >= width:
        return rows
    wider = np.full((rows.shape[0], width), fill, dtype=np.int64)
    wider[:, : rows.shape[1]] = rows
    return wider


def row_strides(dims: Ints) -> Ints:
    """Return the row-major strides, in elements, for the shape in each row of `dims` [n, D]."""
    strides = np.ones_like(dims)
    for d in range(dims.shape[1] - 2, -1, -1):
        strides[:, d] = strides[:, d + 1] * dims[:, d + 1]
    return strides


def packed_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a contiguous row-major tensor of this shape."""
    strides: list[int] = []
    for length in reversed(shape):
        strides.append(itemsize)
        itemsize *= length
    return tuple(reversed(strides))


def box_runs(dims: tuple[int, ...], low: tuple[int, ...], count: tuple[int, ...], itemsize: int) -> tuple[Ints, int]:
    """Return the bytes at which a box's contiguous runs start in a row-major tensor, ascending, and one run's length.

    All runs have the same length, in bytes. The tensor has at least one dimension; the box of shape `count` at `low`
    has at least one element.
    """
    inner = itemsize  # bytes of one step along dimension `last`
    last = len(dims) - 1
    while last > 0 and count[last] == dims[last]:
        inner *= dims[last]
        last -= 1
    starts = np.array([low[last] * inner], dtype=np.int64)
    stride = inner * dims[last]
    for d in range(last - 1, -1, -1):
        steps = (low[d] + np.arange(count[d], dtype=np.int64)) * stride
        starts = (steps[:, None] + starts[None, :]).reshape(-1)
        stride *= dims[d]
    return starts, count[last] * inner


def flat_boxes(dims: Ints, start: Ints, count: Ints) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Convert flat ranges [start, start + count) of tensors of shape `dims` [p, D] to boxes.

    Counts are at least 1, and ranges lie inside their tensors. Returns offsets [p, D], shapes [p, D] and whether each
    range is a box [p]. If a range is none, its offset and shape mean nothing.
    """
    strides = row_strides(dims)
    offset = np.zeros_like(dims)
    shape = np.ones_like(dims)
    left = count.copy()
    is_box = np.ones(len(start), dtype=np.bool_)
    split = np.zeros(len(start), dtype=np.bool_)  # the dimension that limits the range has been passed
    for d in range(dims.shape[1]):
        stride = strides[:, d]
        at = (start // stride) % np.maximum(dims[:, d], 1)
        here = ~split & (left >= stride)  # the first dimension along which the range takes whole steps
        steps = left // stride
        is_box &= ~here | ((left % stride == 0) & (at + steps <= dims[:, d]))
        is_box &= ~split | (at == 0)
        offset[:, d] = at
        shape[:, d] = np.where(split, dims[:, d], np.where(here, steps, 1))
        split |= here
    return offset, shape, is_box


def measure(offset: Ints, shape: Ints, dims: Ints) -> Words:
    """Give each box [n, D] in a tensor of shape `dims` [n, D] a random weight that adds up mod 2^64 over any tiling.

    An element's weight is the product, over dimensions, of differences of a hash, so the sum over a box telescopes.
    If the weights of non-empty boxes sum to the weight of the whole tensor, the boxes tile it, but for a chance of
    about 2^-60.
    """
    weight = np.ones(len(offset), dtype=np.uint64)
    for d in range(offset.shape[1]):
        base = np.uint64(d << 56)  # another stretch of the generator per dimension
        low = offset[:, d].astype(np.uint64)
        high = (offset[:, d] + shape[:, d]).astype(np.uint64)
        # A dimension of 1 cannot be cut: no need to spend bits of the weight on it.
        weight *= np.where(dims[:, d] == 1, np.uint64(1), splitmix64(high + base) - splitmix64(low + base))
    return weight
