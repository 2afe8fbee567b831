"""What one rank holds of the tensors: shards, each a box of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import CodecError, SourceError
from weightsync.plan.boxes import Ints, pad_shapes, padded_width
from weightsync.plan.dtypes import dtype_named
from weightsync.plan.packing import FORMAT, Packed, column, digest_of, frozen, pack, unpack
from weightsync.plan.table import MAX_NDIM, TensorTable, check_local_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

__all__ = ["MAX_SHARDS", "Layout", "Shard"]

MAX_SHARDS = 1 << 23  # of one rank


@dataclass(frozen=True)
class Shard:
    """One box of one tensor, as a single object. Offsets and shapes in elements of the global tensor."""

    name: str
    dtype: str  # torch's name without "torch."
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class PackedLayout(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    tensors: bytes  # a packed table
    width: int  # D
    tensor: bytes  # int32
    offset: bytes  # int64, [n, D]
    shape: bytes  # int64, [n, D]


@dataclass(frozen=True, eq=False)
class Layout:
    """What one rank holds: boxes (shards) of tensors.

    D is the width of `offset` and `shape`, at least the tensors' own. A tensor may have no shard here, several, or
    empty ones. The constructor trusts its arguments.
    """

    tensors: TensorTable
    tensor: npt.NDArray[np.int32]  # [n] index into `tensors`
    offset: Ints  # [n, D] in elements of the global tensor; unused dimensions 0
    shape: Ints  # [n, D] unused dimensions 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor", frozen(np.ascontiguousarray(self.tensor, dtype=np.int32)))
        object.__setattr__(self, "offset", frozen(np.ascontiguousarray(self.offset, dtype=np.int64)))
        object.__setattr__(self, "shape", frozen(np.ascontiguousarray(self.shape, dtype=np.int64)))

    def __len__(self) -> int:
        return len(self.tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def of(cls, shards: Iterable[Shard], aliases: Iterable[tuple[str, str]] = ()) -> Layout:
        """Make the layout of these shards, with tensors in the order of their first shards.

        Raises `SourceError` naming the tensor that is wrong.
        """
        held = list(shards)
        index: dict[str, int] = {}
        first: list[Shard] = []
        tensor = np.empty(len(held), dtype=np.int32)
        for i, shard in enumerate(held):
            at = index.setdefault(shard.name, len(first))
            if at == len(first):
                first.append(shard)
                dtype_named(shard.dtype, shard.name)
            seen = first[at]
            if seen.dtype != shard.dtype or seen.global_shape != shard.global_shape:
                raise SourceError(
                    f"tensor {shard.name!r} is given as {seen.dtype} {seen.global_shape} and as {shard.dtype} "
                    f"{shard.global_shape}"
                )
            if not len(shard.offset) == len(shard.shape) == len(shard.global_shape):
                raise SourceError(
                    f"tensor {shard.name!r} of shape {shard.global_shape} has a shard at {shard.offset} of shape "
                    f"{shard.shape}: not as many dimensions"
                )
            tensor[i] = at
        table = TensorTable(
            names=tuple(index),
            dtypes=tuple(shard.dtype for shard in first),
            shapes=tuple(shard.global_shape for shard in first),
            aliases=tuple(aliases),
        )
        check_local_table(table)
        offset = pad_shapes([shard.offset for shard in held], table.width, 0)
        shape = pad_shapes([shard.shape for shard in held], table.width, 1)
        if fault := _shard_fault(table, tensor, offset, shape):
            raise SourceError(fault)
        return cls(table, tensor, offset, shape)

    def shard(self, i: int) -> Shard:
        """Return shard `i` as an object."""
        at = int(self.tensor[i])
        shape = self.tensors.shapes[at]
        return Shard(
            name=self.tensors.names[at],
            dtype=self.tensors.dtypes[at],
            global_shape=shape,
            offset=tuple(self.offset[i, : len(shape)].tolist()),
            shape=tuple(self.shape[i, : len(shape)].tolist()),
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return int((self.shape.prod(axis=1, dtype=np.int64) * self.tensors.itemsizes[self.tensor]).sum())

    def pack(self) -> bytes:
        """This layout as bytes, the same for equal layouts."""
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        return pack(
            PackedLayout(
                format=FORMAT,
                tensors=self.tensors.pack(),
                width=self.offset.shape[1],
                tensor=self.tensor.astype("<i4").tobytes(),
                offset=self.offset.astype("<i8").tobytes(),
                shape=self.shape.astype("<i8").tobytes(),
            )
        )

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell this layout from any other, the tensors included."""
        return digest_of(self._packed)

    @classmethod
    def unpack(cls, data: bytes, tables: dict[bytes, TensorTable] | None = None) -> Layout:
        """Restore a layout from its `pack`ed bytes. Raises `CodecError`.

        `tables` caches tables by digest: a known table is used again, a new one is added. The ranks of a trainer
        usually send the same table, which makes up most of the bytes and nearly all of the work.
        """
        raw = unpack(data, PackedLayout)
        table = _known_table(raw.tensors, tables)
        if not table.width <= raw.width <= MAX_NDIM:
            raise CodecError(f"a layout is {raw.width} dimensions wide, its tensors {table.width}")
        tensor = column(raw.tensor, "<i4", "tensor").astype(np.int32)
        if len(tensor) > MAX_SHARDS:
            raise CodecError(f"a layout has {len(tensor)} shards, more than {MAX_SHARDS}")
        offset = column(raw.offset, "<i8", "offset")
        shape = column(raw.shape, "<i8", "shape")
        if not len(offset) == len(shape) == len(tensor) * raw.width:
            raise CodecError("a layout's columns have different lengths")
        offset = offset.reshape(len(tensor), raw.width)
        shape = shape.reshape(len(tensor), raw.width)
        if fault := _shard_fault(table, tensor, offset, shape):
            raise CodecError(fault)
        layout = cls(table, tensor, offset, shape)
        layout.__dict__["_packed"] = data
        return layout


def _known_table(data: bytes, tables: dict[bytes, TensorTable] | None) -> TensorTable:
    if tables is None:
        return TensorTable.unpack(data)
    digest = digest_of(data)
    table = tables.get(digest)
    if table is None:
        table = tables[digest] = TensorTable.unpack(data)
    return table


def _shard_fault(table: TensorTable, tensor: npt.NDArray[np.int32], offset: Ints, shape: Ints) -> str | None:
    """Say in a sentence what is wrong with the shards of a layout; None if nothing is."""
    if not len(tensor):
        return None
    if int(tensor.min()) < 0 or int(tensor.max()) >= len(table):
        return "a shard belongs to a tensor that is not there"
    dims = padded_width(table.dims, offset.shape[1], 1)[tensor]
    unused = np.arange(offset.shape[1]) >= table.ndims[tensor][:, None]
    inside = (offset >= 0) & (shape >= 0) & (shape <= dims)
    inside &= offset <= dims - np.where(inside, shape, 0)
    inside &= ~unused | ((offset == 0) & (shape == 1))
    if inside.all():
        return None
    bad = int(np.argmin(inside.all(axis=1)))
    at = int(tensor[bad])
    return (
        f"tensor {table.names[at]!r} of shape {table.shapes[at]} has a shard outside it: offset "
        f"{tuple(offset[bad].tolist())}, shape {tuple(shape[bad].tolist())}"
    )
