"""For tests of plans and sources: fills buckets and reads them back, with numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from weightsync.plan.dtypes import BY_NAME
from weightsync.plan.manifest import Layout, Shard
from weightsync.plan.parts import parts_by_bucket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.buckets import Plan
    from weightsync.plan.manifest import Manifest

_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def raw_dtype(name: str) -> np.dtype:
    """Return the unsigned dtype that stands for elements of this dtype."""
    return np.dtype(_RAW[BY_NAME[name].itemsize])


def window(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of a box."""
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def whole(name: str, dtype: str, shape: tuple[int, ...]) -> Shard:
    """Return the shard of a rank that holds the whole tensor."""
    return Shard(name, dtype, shape, (0,) * len(shape), shape)


def rows(name: str, shape: tuple[int, ...], begin: int, end: int, dtype: str = "float32") -> Shard:
    """Return the shard of rows [begin, end) of a tensor."""
    rest = shape[1:]
    return Shard(name, dtype, shape, (begin, *(0 for _ in rest)), (end - begin, *rest))


def rank(*shards: Shard) -> Layout:
    """Return the layout of a rank with these shards."""
    return Layout.of(shards)


def filled(plan: Plan, layouts: Sequence[Layout], shards: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Return every bucket as the ranks write it from their shards' data. Bytes that no rank writes are 0xEE."""
    m = plan.manifest
    buckets = [np.full(n, 0xEE, np.uint8) for n in m.bucket_nbytes.tolist()]
    for layout, fills, data in zip(layouts, plan.fills, shards, strict=True):
        for bucket, parts in enumerate(parts_by_bucket(m, layout, fills)):
            for part in parts:
                target = piece_view(m, buckets[bucket], part.piece)
                target[window(part.dst_offset, part.shape)] = data[part.shard][window(part.src_offset, part.shape)]
    return buckets


def piece_view(m: Manifest, bucket: np.ndarray, piece: int) -> np.ndarray:
    """Return a view of a piece in its bucket: raw elements in its box's shape."""
    begin = int(m.piece_offset[piece])
    dtype = raw_dtype(m.tensors.dtypes[m.piece_tensor[piece]])
    return bucket[begin : begin + int(m.piece_nbytes[piece])].view(dtype).reshape(m.piece_box(piece)[1])


def read_back(m: Manifest, buckets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors in these buckets, as raw elements."""
    table = m.tensors
    tensors = {n: np.zeros(s, raw_dtype(d)) for n, d, s in zip(table.names, table.dtypes, table.shapes, strict=True)}
    for bucket, data in enumerate(buckets):
        for piece in m.bucket_pieces(bucket):
            name = table.names[m.piece_tensor[piece]]
            tensors[name][window(*m.piece_box(piece))] = piece_view(m, data, piece)
    return tensors
