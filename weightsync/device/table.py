"""Turns boxes into items of the kernel in `boxes.cu`. Pure numpy.

A box is moved from one place to another. Each place is a base (an index, whose address is known at the launch), an
offset and strides. A box becomes runs, which are contiguous on both sides and within a row of the tensor. Runs become
items of at most `CHUNK` bytes: enough items to keep every multiprocessor busy, each long enough to be worth a block. If
runs are long, an item takes a stretch of each of several runs, rather than one whole run. Coefficients that depend on
the column alone are then worked out once for all of its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Items = npt.NDArray[Any]

__all__ = ["BYTES", "CHUNK", "F32_TO_BF16", "ITEM", "SLOT", "Place", "box_items", "joined"]

CHUNK = 128 * 1024  # bytes of an item
_STRETCH = 8 * 1024  # bytes that a block's threads take at a time, 16 each
_ALIGN = 256  # bytes: long runs are cut at multiples of this, so that an item takes whole lines of memory
SLOT = 0xFFFFFFFF  # the base that each launch gets separately
BYTES, F32_TO_BF16 = 0, 1  # `op`: how each element is written

ITEM = np.dtype(
    [
        ("src", "<u8"),
        ("dst", "<u8"),
        ("col", "<u8"),
        ("src_pitch", "<i8"),
        ("dst_pitch", "<i8"),
        ("col_step", "<i8"),
        ("src_base", "<u4"),
        ("dst_base", "<u4"),
        ("row_bytes", "<u4"),
        ("rows", "<u4"),
        ("row", "<u4"),
        ("row_step", "<u4"),
        ("total", "<u4"),
        ("op", "<u4"),
    ]
)
"""`struct Item` of boxes.cu."""


class Place(NamedTuple):
    """Where a box lies: its first element's offset from the base, and the strides of its dimensions, all in bytes."""

    base: int
    offset: int
    strides: tuple[int, ...]


class _Dim(NamedTuple):
    length: int
    src: int  # bytes from one index to the next, on either side …
    dst: int
    col: int  # … and in the tensor's row; or
    row: int  # rows of the tensor


def box_items(
    shape: tuple[int, ...],
    itemsize: int,
    src: Place,
    dst: Place | None,
    *,
    tensor_shape: tuple[int, ...],
    offset: tuple[int, ...],
    total: int = 0,
    op: int = BYTES,
) -> Items:
    """Return the items of one box, `ITEM` [n].

    `itemsize` is that of the elements as written and summed. `dst` is None if the box is only summed. The box lies at
    `offset` (elements) in a tensor of `tensor_shape`. Its fingerprint depends on both; it is added to `totals[total]`.
    """
    if 0 in shape:
        return np.empty(0, dtype=ITEM)
    wide_src = itemsize if op == BYTES else 4
    dims, row, col = _dims(shape, itemsize, src, dst, tensor_shape, offset)
    run = 1
    while dims and dims[-1].row == 0 and dims[-1][1:4] == (run * wide_src, run * itemsize, run * itemsize):
        run *= dims.pop().length
    rows = dims.pop() if dims else _Dim(1, 0, 0, 0, 0)
    while dims and dims[-1][1:] == tuple(step * rows.length for step in rows[1:]):
        rows = rows._replace(length=rows.length * dims.pop().length)
    starts = np.array([[src.offset, dst.offset if dst is not None else 0, col, row]], dtype=np.int64)
    for dim in dims:
        starts = _spread(starts, dim, np.arange(dim.length))
    run_bytes = run * itemsize
    width = _width(run_bytes, rows.length)
    several = CHUNK // width
    firsts, cuts = np.arange(0, rows.length, several), np.arange(0, run_bytes, width)
    starts = _spread(starts, rows, firsts)
    starts = _spread(starts, _Dim(0, wide_src, itemsize, itemsize, 0), cuts // itemsize)
    boxes = len(starts) // (len(firsts) * len(cuts))
    counts = np.tile(np.repeat(np.minimum(several, rows.length - firsts), len(cuts)), boxes)
    row_bytes = np.tile(np.minimum(width, run_bytes - cuts), boxes * len(firsts))
    items = np.zeros(len(starts), dtype=ITEM)
    items["src"], items["dst"], items["col"], items["row"] = starts.T
    items["src_pitch"], items["dst_pitch"] = rows.src, rows.dst
    items["col_step"], items["row_step"] = rows.col, rows.row
    items["src_base"] = src.base
    items["dst_base"] = dst.base if dst is not None else SLOT
    items["row_bytes"], items["rows"] = row_bytes, counts
    items["total"], items["op"] = total, op
    return items


def _width(run_bytes: int, rows: int) -> int:
    """Return how many bytes of each run an item has: all of them, or one of several parts of about equal length."""
    if run_bytes <= _STRETCH:
        return run_bytes
    pieces = -(-run_bytes // max(_STRETCH, CHUNK // rows))
    return -(-run_bytes // (pieces * _ALIGN)) * _ALIGN


def joined(parts: Sequence[Items]) -> Items:
    """Join the items of several boxes into one table. Without any, it is empty."""
    if not parts:
        return np.empty(0, dtype=ITEM)
    # as bytes: else numpy works out a common type for the fields of each two parts, 35 µs a part
    return np.concatenate([part.view(np.uint8) for part in parts]).view(ITEM)


def _dims(
    shape: tuple[int, ...],
    itemsize: int,
    src: Place,
    dst: Place | None,
    tensor_shape: tuple[int, ...],
    offset: tuple[int, ...],
) -> tuple[list[_Dim], int, int]:
    """Return the dimensions longer than 1, and the row and the column (bytes) at which the box begins."""
    in_rows = len(shape) > 1  # a tensor of one dimension is a single row
    row = offset[0] if in_rows else 0
    dims, col, step, packed = [], 0, itemsize, itemsize
    for d in reversed(range(len(shape))):
        of_row = in_rows and d == 0
        if not of_row:
            col += offset[d] * step
        if shape[d] > 1:
            there = dst.strides[d] if dst is not None else packed
            dims.append(_Dim(shape[d], src.strides[d], there, 0 if of_row else step, int(of_row)))
        step *= tensor_shape[d]
        packed *= shape[d]
    return dims[::-1], row, col


def _spread(starts: npt.NDArray[np.int64], dim: _Dim, at: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Repeat each start [n, (src, dst, col, row)] for each index `at` of a dimension."""
    steps = np.asarray(at, dtype=np.int64)[:, None] * np.array(dim[1:], dtype=np.int64)
    spread: npt.NDArray[np.int64] = (starts[:, None, :] + steps[None]).reshape(-1, 4)
    return spread
