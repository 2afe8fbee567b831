"""Which tensors exist: names, element types, global shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import CodecError, SourceError
from weightsync.plan.boxes import Ints, as_tuples, pad_shapes
from weightsync.plan.dtypes import BY_CODE, BY_NAME
from weightsync.plan.packing import FORMAT, Packed, column, digest_of, frozen, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["MAX_NAME_BYTES", "MAX_NDIM", "MAX_TENSORS", "MAX_TOTAL_BYTES", "TensorTable", "check_local_table"]

MAX_TENSORS = 1 << 21  # about ten times the largest model known: 60 layers of 384 experts with scales
MAX_NAME_BYTES = 512
MAX_NDIM = 16  # torch's own kernels stop at 25 dimensions; weights have at most 5
MAX_TOTAL_BYTES = 1 << 61  # sums and products stay clear of int64's end, even with the rounding of floats

_CODES = {name: dtype.code for name, dtype in BY_NAME.items()}
_NAMES = {code: dtype.name for code, dtype in BY_CODE.items()}
_ITEMSIZES = np.zeros(256, dtype=np.int64)
_ITEMSIZES[list(BY_CODE)] = [dtype.itemsize for dtype in BY_CODE.values()]
_KNOWN = _ITEMSIZES > 0


class PackedTable(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    names: bytes  # utf-8, NUL between names
    dtypes: bytes  # one code each
    ndims: bytes  # uint8 each
    dims: bytes  # int64 little-endian, each tensor's own dimensions, one tensor after the other
    alias_names: bytes  # utf-8, NUL between names
    alias_of: bytes  # int32 little-endian, index into names


@dataclass(frozen=True, eq=False)
class TensorTable:
    """The tensors that exist: names, element types, global shapes. Aliases are further names of tied tensors.

    Tied tensors are sent once. The constructor trusts its arguments; `unpack` and `Layout.of` check them.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # torch's names without "torch."
    shapes: tuple[tuple[int, ...], ...]
    aliases: tuple[tuple[str, str], ...] = ()  # (other name, name in `names`)

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position by name; aliases are not in it."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def ndims(self) -> npt.NDArray[np.uint8]:
        """uint8 [n]"""
        return frozen(np.fromiter(map(len, self.shapes), dtype=np.uint8, count=len(self.shapes)))

    @property
    def width(self) -> int:
        """The largest number of dimensions of any tensor."""
        return int(self.ndims.max(initial=0))

    @cached_property
    def dims(self) -> Ints:
        """int64 [n, width], unused dimensions 1."""
        return frozen(pad_shapes(self.shapes, self.width, 1))

    @cached_property
    def itemsizes(self) -> Ints:
        """int64 [n], bytes per element."""
        codes = np.frombuffer(self._codes, dtype=np.uint8)
        return frozen(_ITEMSIZES[codes])

    @cached_property
    def numels(self) -> Ints:
        """int64 [n], elements."""
        return frozen(self.dims.prod(axis=1, dtype=np.int64))

    @cached_property
    def sizes(self) -> Ints:
        """int64 [n], bytes."""
        return frozen(self.numels * self.itemsizes)

    @cached_property
    def _codes(self) -> bytes:
        return bytes(map(_CODES.__getitem__, self.dtypes))

    def numel(self, i: int) -> int:
        """Elements of tensor `i`."""
        return int(self.numels[i])

    def nbytes(self, i: int) -> int:
        """Bytes of tensor `i`."""
        return int(self.sizes[i])

    def reordered(self, order: Ints, aliases: tuple[tuple[str, str], ...]) -> TensorTable:
        """Return a table of the tensors at these positions, in this order, with these aliases."""
        places = order.tolist()
        table = TensorTable(
            names=tuple(map(self.names.__getitem__, places)),
            dtypes=tuple(map(self.dtypes.__getitem__, places)),
            shapes=tuple(map(self.shapes.__getitem__, places)),
            aliases=aliases,
        )
        codes = np.frombuffer(self._codes, dtype=np.uint8)[order].tobytes()
        table.__dict__.update(_codes=codes, dims=frozen(self.dims[order]), ndims=frozen(self.ndims[order]))
        return table

    def pack(self) -> bytes:
        """This table as bytes, the same for equal tables."""
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        own = np.arange(self.width) < self.ndims[:, None]
        targets = np.fromiter((self.index[name] for _, name in self.aliases), dtype="<i4", count=len(self.aliases))
        return pack(
            PackedTable(
                format=FORMAT,
                names="\0".join(self.names).encode(),
                dtypes=self._codes,
                ndims=self.ndims.tobytes(),
                dims=self.dims[own].astype("<i8").tobytes(),
                alias_names="\0".join(other for other, _ in self.aliases).encode(),
                alias_of=targets.tobytes(),
            )
        )

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell this table from any other."""
        return digest_of(self._packed)

    @classmethod
    def unpack(cls, data: bytes) -> TensorTable:
        """Restore a table from its `pack`ed bytes. Raises `CodecError`."""
        raw = unpack(data, PackedTable)
        names = _split_names(raw.names, "tensor")
        codes = np.frombuffer(raw.dtypes, dtype=np.uint8)
        ndims = np.frombuffer(raw.ndims, dtype=np.uint8)
        flat = column(raw.dims, "<i8", "dims")
        others = _split_names(raw.alias_names, "alias")
        targets = column(raw.alias_of, "<i4", "alias_of")
        if not len(codes) == len(ndims) == len(names) or len(targets) != len(others):
            raise CodecError("a tensor table's columns have different lengths")
        if len(names) and int(ndims.max()) > MAX_NDIM:
            raise CodecError(f"a tensor has {int(ndims.max())} dimensions, more than {MAX_NDIM}")
        if int(ndims.sum(dtype=np.int64)) != len(flat):
            raise CodecError("a tensor table's dimensions do not match its shapes")
        if not _KNOWN[codes].all():
            raise CodecError(f"tensor {names[int(np.argmin(_KNOWN[codes]))]!r} has an unknown dtype code")
        width = int(ndims.max(initial=0))
        dims = np.ones((len(names), width), dtype=np.int64)
        dims[np.arange(width) < ndims[:, None]] = flat
        if fault := _table_fault(names, others, targets, dims, _ITEMSIZES[codes]):
            raise CodecError(fault)
        table = cls(
            names=tuple(names),
            dtypes=tuple(map(_NAMES.__getitem__, raw.dtypes)),
            shapes=tuple(as_tuples(dims, ndims)),
            aliases=tuple((other, names[at]) for other, at in zip(others, targets.tolist(), strict=True)),
        )
        # Fill the caches with the values at hand. The packed bytes are kept because the digest is computed from them.
        table.__dict__.update(_packed=data, _codes=raw.dtypes, dims=frozen(dims), ndims=frozen(ndims.copy()))
        return table


def check_local_table(table: TensorTable) -> None:
    """Raise `SourceError` if this rank's own table breaks a rule that readers will check."""
    if len(table) > MAX_TENSORS:
        raise SourceError(f"{len(table)} tensors, more than {MAX_TENSORS}")
    for name in (*table.names, *(other for other, _ in table.aliases)):
        try:
            length = len(name.encode())
        except UnicodeEncodeError as error:
            raise SourceError(f"tensor name {name!r} is not valid utf-8") from error
        if not 0 < length <= MAX_NAME_BYTES or "\0" in name:
            raise SourceError(
                f"tensor name {name[:80]!r} cannot be sent",
                hint=f"names have 1 to {MAX_NAME_BYTES} bytes of utf-8 and no NUL",
            )
    for name, shape in zip(table.names, table.shapes, strict=True):
        if len(shape) > MAX_NDIM:
            raise SourceError(f"tensor {name!r} has {len(shape)} dimensions, more than {MAX_NDIM}")
    unknown = [name for _, name in table.aliases if name not in table.index]
    if unknown:
        raise SourceError(f"an alias names tensor {unknown[0]!r}, which is not there")
    others = [other for other, _ in table.aliases]
    if fault := _table_fault(table.names, others, np.empty(0, dtype=np.int64), table.dims, table.itemsizes):
        raise SourceError(fault)


def _split_names(data: bytes, what: str) -> list[str]:
    if not data:
        return []
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 0)
    if len(ends) >= MAX_TENSORS:
        raise CodecError(f"{len(ends) + 1} {what} names, more than {MAX_TENSORS}")
    lengths = np.diff(ends, prepend=-1, append=len(data)) - 1
    if int(lengths.min()) == 0 or int(lengths.max()) > MAX_NAME_BYTES:
        raise CodecError(f"an empty {what} name, or one of more than {MAX_NAME_BYTES} bytes")
    try:
        return data.decode().split("\0")
    except UnicodeDecodeError as error:
        raise CodecError(f"{what} names are not utf-8: {error}") from error


def _table_fault(names: Sequence[str], others: Sequence[str], targets: Ints, dims: Ints, itemsizes: Ints) -> str | None:
    """Say in a sentence what is wrong with a table whose columns match in length; None if nothing is."""
    every = set(names)
    every.update(others)
    if len(every) != len(names) + len(others):
        twice, _ = Counter((*names, *others)).most_common(1)[0]
        return f"name {twice!r} occurs twice"
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= len(names)):
        return "an alias names a tensor that is not there"
    if not len(names):
        return None
    if (dims < 0).any():
        return f"tensor {names[int(np.argmax((dims < 0).any(axis=1)))]!r} has a negative dimension"
    # Zeros count as ones: strides are worked out for empty tensors, too, and must not overflow.
    with np.errstate(over="ignore"):
        sizes = np.maximum(dims, 1).astype(np.float64).prod(axis=1) * itemsizes
        total = float(sizes.sum())
    if total > MAX_TOTAL_BYTES:
        return f"tensor {names[int(np.argmax(sizes))]!r} is too large: its size does not fit in 64 bits"
    return None
