"""Which bytes of each bucket the ranks of each node write, if a trainer's ranks are on several nodes.

A *run* is a stretch of bytes of a slot. The bridges of the nodes give one another their runs of a bucket; afterwards
each bridge has the whole bucket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from weightsync.plan.boxes import Ints, padded_width, row_strides
from weightsync.plan.shares import Share

if TYPE_CHECKING:
    from weightsync.plan.manifest import Manifest
    from weightsync.plan.parts import Overlaps

__all__ = ["shares_by_bucket"]


def shares_by_bucket(manifest: Manifest, met: Overlaps, node: Ints) -> tuple[tuple[Share, ...], ...]:
    """List, for each bucket, the runs that each node writes.

    `met` are the boxes cut at pieces, and `node` [m] is the node that writes each. Padding between two runs of one node
    is joined to them, because one longer run is cheaper than two.
    """
    boxes = _united(met, node)
    start, length, of_box = _in_elements(manifest, boxes)
    piece = boxes.piece[of_box]
    itemsize = manifest.tensors.itemsizes[manifest.piece_tensor[piece]]
    start = manifest.piece_offset[piece] + start * itemsize
    end = start + length * itemsize
    bucket, whose = manifest.piece_bucket[piece], boxes.node[of_box]
    order = np.lexsort((start, bucket))
    start, end, bucket, whose = start[order], end[order], bucket[order], whose[order]
    follows = np.zeros(len(start), dtype=np.bool_)
    follows[1:] = (bucket[1:] == bucket[:-1]) & (whose[1:] == whose[:-1]) & (start[1:] - end[:-1] < manifest.alignment)
    first = np.flatnonzero(~follows)
    start, bucket, whose = start[first], bucket[first], whose[first]
    end = np.maximum.reduceat(end, first) if len(first) else end
    order = np.lexsort((start, whose, bucket))
    runs = np.stack([start, end - start], axis=1)[order].astype("<i8")
    key = np.stack([bucket, whose], axis=1)[order]
    begins = np.flatnonzero((np.diff(key, axis=0, prepend=-1) != 0).any(axis=1))
    shares: list[list[Share]] = [[] for _ in range(manifest.buckets)]
    for (index, owner), some in zip(key[begins].tolist(), np.split(runs, begins[1:]), strict=True):
        shares[index].append(Share(owner, some.tobytes()))
    return tuple(map(tuple, shares))


class _Boxes(NamedTuple):
    piece: Ints  # [b]
    node: Ints  # [b]
    offset: Ints  # [b, width] in the tensor
    shape: Ints  # [b, width]


def _united(met: Overlaps, node: Ints) -> _Boxes:
    """Join all boxes that a node writes of a piece if they make up one box, as the rows of several FSDP ranks do."""
    order = np.lexsort((node, met.piece))
    piece, node, offset, shape = met.piece[order], node[order], met.offset[order], met.shape[order]
    if not len(piece):
        return _Boxes(piece, node, offset, shape)
    changes = (np.diff(piece, prepend=-1) != 0) | (np.diff(node, prepend=-1) != 0)
    first = np.flatnonzero(changes)
    low = np.minimum.reduceat(offset, first)
    high = np.maximum.reduceat(offset + shape, first)
    elements = np.add.reduceat(shape.prod(axis=1), first)
    is_box = (high - low).prod(axis=1) == elements  # enough, because boxes of one piece do not overlap
    apart = ~is_box[np.cumsum(changes) - 1]
    return _Boxes(
        np.concatenate([piece[first][is_box], piece[apart]]),
        np.concatenate([node[first][is_box], node[apart]]),
        np.concatenate([low[is_box], offset[apart]]),
        np.concatenate([(high - low)[is_box], shape[apart]]),
    )


def _in_elements(manifest: Manifest, boxes: _Boxes) -> tuple[Ints, Ints, Ints]:
    """List the contiguous runs of all boxes: each one's start in the piece, its length and its box, in elements."""
    piece_offset, piece_shape = manifest.piece_boxes
    width = max(1, manifest.tensors.width)  # 0 where all tensors are scalars
    dims = padded_width(piece_shape[boxes.piece], width, 1)
    low = padded_width(boxes.offset - piece_offset[boxes.piece], width, 0)
    shape = padded_width(boxes.shape, width, 1)
    strides = row_strides(dims)
    whole = shape == dims
    # `last` is the outermost dimension from which on a box is contiguous: it takes all later dimensions whole
    after = np.ones_like(whole)
    for d in range(width - 2, -1, -1):
        after[:, d] = after[:, d + 1] & whole[:, d + 1]
    last = after.argmax(axis=1)[:, None]
    length = np.take_along_axis(shape * strides, last, axis=1)[:, 0]
    outer = np.where(np.arange(width) < last, shape, 1)
    counts = outer.prod(axis=1)
    of_box = np.repeat(np.arange(len(counts)), counts)
    left = np.arange(len(of_box)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = (low * strides).sum(axis=1)[of_box]
    for d in range(width - 1, -1, -1):
        start += left % outer[of_box, d] * strides[of_box, d]
        left //= outer[of_box, d]
    return start, length[of_box], of_box
