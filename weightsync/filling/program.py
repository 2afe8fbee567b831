"""A rank's program: what it writes where in a push of one plan. Pure, except that it names torch's dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from weightsync.plan.dtypes import BY_NAME
from weightsync.plan.parts import parts_by_bucket

if TYPE_CHECKING:
    import numpy as np

    from weightsync.plan.layout import Layout
    from weightsync.plan.manifest import Manifest

__all__ = ["Filled", "Program", "Write", "compile_program"]


@dataclass(frozen=True)
class Filled:
    """One bucket into which this rank has written all of its parts."""

    bucket: int
    nbytes: int
    sums: dict[int, int]  # tensor of the manifest → fingerprint of what this rank wrote of it


@dataclass(frozen=True, slots=True)
class Write:
    """One part: a box of a local shard, and its place in the slot."""

    shard: int
    src_offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    itemsize: int
    begin: int  # bytes of the slot that the part's piece takes up
    end: int
    piece_shape: tuple[int, ...]
    dst_offset: tuple[int, ...]
    whole_piece: bool
    tensor: int
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Program:
    """Everything this rank writes in a push of one plan, by bucket."""

    plan: bytes
    writes: tuple[tuple[Write, ...], ...]
    width: int  # the largest number of dimensions that a tensor has

    @cached_property
    def longest(self) -> int:
        """The bytes that a slot must have: up to the last byte of any piece that this rank writes into."""
        return max((write.end for bucket in self.writes for write in bucket), default=0)

    @cached_property
    def nbytes(self) -> int:
        """The bytes that this rank writes. Bytes that a replica writes elsewhere are not among them."""
        return sum(write.nbytes for bucket in self.writes for write in bucket)

    @property
    def buckets(self) -> int:
        """The number of buckets in which this rank has a part."""
        return sum(1 for bucket in self.writes if bucket)


def compile_program(plan: bytes, manifest: Manifest, layout: Layout, fills: np.ndarray[Any, Any]) -> Program:
    """Compile the program of the rank that has `layout`. Raises `RemoteProtocolError` if plan and layout do not fit."""
    table = manifest.tensors
    local = layout.tensors
    dtypes = [getattr(torch, name) for name in table.dtypes]
    writes: list[tuple[Write, ...]] = []
    offsets = layout.offset.tolist()
    local_names = local.names
    for parts in parts_by_bucket(manifest, layout, fills):
        bucket: list[Write] = []
        for part in parts:
            tensor = int(manifest.piece_tensor[part.piece])
            itemsize = BY_NAME[table.dtypes[tensor]].itemsize
            _, piece_shape = manifest.piece_box(part.piece)
            begin = int(manifest.piece_offset[part.piece])
            count = int(manifest.piece_count[part.piece])
            shape = part.shape
            shard_offset = offsets[part.shard][: len(shape)]
            numel = 1
            for length in shape:
                numel *= length
            assert local_names[int(layout.tensor[part.shard])] == table.names[tensor]
            bucket.append(
                Write(
                    shard=part.shard,
                    src_offset=part.src_offset,
                    shape=shape,
                    dtype=dtypes[tensor],
                    itemsize=itemsize,
                    begin=begin,
                    end=begin + count * itemsize,
                    piece_shape=piece_shape,
                    dst_offset=part.dst_offset,
                    whole_piece=numel == count,
                    tensor=tensor,
                    global_shape=table.shapes[tensor],
                    global_offset=tuple(a + b for a, b in zip(shard_offset, part.src_offset, strict=True)),
                    nbytes=numel * itemsize,
                )
            )
        writes.append(tuple(bucket))
    return Program(plan, tuple(writes), table.width)
