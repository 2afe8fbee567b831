"""What a push consists of: the tensors, what each rank holds of them, and the buckets they travel in.

`TensorTable` says which tensors exist, `Layout` what one rank holds of them, `Manifest` what every reader of a push
needs. All three are immutable and told apart by `digest` (16 bytes over everything in them). Each travels as one
MessagePack map of a few binary columns, so that a million shards are a few array copies. `unpack` takes bytes of any
origin: it checks everything before use and raises only `CodecError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import CodecError
from weightsync.plan.boxes import Ints, flat_boxes
from weightsync.plan.layout import MAX_SHARDS, Layout, Shard
from weightsync.plan.packing import FORMAT, Packed, column, digest_of, frozen, pack, unpack
from weightsync.plan.table import MAX_NAME_BYTES, MAX_NDIM, MAX_TENSORS, MAX_TOTAL_BYTES, TensorTable

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "MAX_NAME_BYTES",
    "MAX_NDIM",
    "MAX_PIECES",
    "MAX_SHARDS",
    "MAX_TENSORS",
    "MAX_TOTAL_BYTES",
    "Layout",
    "Manifest",
    "Shard",
    "TensorTable",
]

MAX_PIECES = 1 << 22
_MAX_ALIGNMENT = 1 << 20


class PackedManifest(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    tensors: bytes  # a packed table
    alignment: int
    piece_tensor: bytes  # int32
    piece_start: bytes  # int64, like all columns below but the last
    piece_count: bytes
    piece_offset: bytes
    bucket_first: bytes
    bucket_nbytes: bytes
    bucket_owner: bytes  # int32


@dataclass(frozen=True, eq=False)
class Manifest:
    """What every reader of a push needs: the tensors in canonical order, cut into pieces, the pieces laid into buckets.

    A piece is the part of a tensor that lies in one bucket: nearly always the whole tensor, and always both a flat
    range in row-major order and a box. Pieces are in the order of their tensors and cover them; empty tensors have
    none. Pieces start at multiples of `alignment` bytes in their slot. The constructor trusts its arguments.
    """

    tensors: TensorTable
    piece_tensor: npt.NDArray[np.int32]  # [p]
    piece_start: Ints  # [p] first element, flat in the global tensor
    piece_count: Ints  # [p] elements
    piece_offset: Ints  # [p] byte in the slot
    bucket_first: Ints  # [b + 1] pieces of bucket i are bucket_first[i]:bucket_first[i + 1], at least one
    bucket_nbytes: Ints  # [b]
    bucket_owner: npt.NDArray[np.int32]  # [b] index of the bridge that assembles the bucket in its slot
    alignment: int

    def __post_init__(self) -> None:
        for name in ("piece_start", "piece_count", "piece_offset", "bucket_first", "bucket_nbytes"):
            object.__setattr__(self, name, frozen(np.ascontiguousarray(getattr(self, name), dtype=np.int64)))
        for name in ("piece_tensor", "bucket_owner"):
            object.__setattr__(self, name, frozen(np.ascontiguousarray(getattr(self, name), dtype=np.int32)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def pieces(self) -> int:
        """How many pieces there are."""
        return len(self.piece_tensor)

    @property
    def buckets(self) -> int:
        """How many buckets there are."""
        return len(self.bucket_nbytes)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return int(self.tensors.sizes.sum())

    @cached_property
    def piece_nbytes(self) -> Ints:
        """int64 [p], bytes of each piece."""
        return frozen(self.piece_count * self.tensors.itemsizes[self.piece_tensor])

    @cached_property
    def piece_bucket(self) -> Ints:
        """int64 [p], the bucket each piece lies in."""
        return frozen(np.repeat(np.arange(self.buckets, dtype=np.int64), np.diff(self.bucket_first)))

    @cached_property
    def piece_boxes(self) -> tuple[Ints, Ints]:
        """Offsets and shapes of all pieces in their tensors, int64 [p, width] each; unused dimensions 0 and 1."""
        offset, shape, _ = flat_boxes(self.tensors.dims[self.piece_tensor], self.piece_start, self.piece_count)
        return frozen(offset), frozen(shape)

    def piece_box(self, i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and shape of piece `i` in its tensor."""
        ndim = int(self.tensors.ndims[self.piece_tensor[i]])
        offset, shape = self.piece_boxes
        return tuple(offset[i, :ndim].tolist()), tuple(shape[i, :ndim].tolist())

    def bucket_pieces(self, bucket: int) -> range:
        """The pieces of one bucket."""
        return range(int(self.bucket_first[bucket]), int(self.bucket_first[bucket + 1]))

    def bucket_tensors(self, bucket: int) -> list[int]:
        """The tensor of each piece of one bucket."""
        tensors: list[int] = self.piece_tensor[slice(*self.bucket_first[bucket : bucket + 2])].tolist()
        return tensors

    def cut_tensors(self) -> list[int]:
        """List the tensors in several pieces: they are larger than a bucket."""
        cut: list[int] = np.flatnonzero(np.bincount(self.piece_tensor, minlength=len(self.tensors)) > 1).tolist()
        return cut

    def pack(self) -> bytes:
        """This manifest as bytes, the same for equal manifests."""
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        return pack(
            PackedManifest(
                format=FORMAT,
                tensors=self.tensors.pack(),
                alignment=self.alignment,
                piece_tensor=self.piece_tensor.astype("<i4").tobytes(),
                piece_start=self.piece_start.astype("<i8").tobytes(),
                piece_count=self.piece_count.astype("<i8").tobytes(),
                piece_offset=self.piece_offset.astype("<i8").tobytes(),
                bucket_first=self.bucket_first.astype("<i8").tobytes(),
                bucket_nbytes=self.bucket_nbytes.astype("<i8").tobytes(),
                bucket_owner=self.bucket_owner.astype("<i4").tobytes(),
            )
        )

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell this manifest from any other."""
        return digest_of(self._packed)

    @classmethod
    def unpack(cls, data: bytes) -> Manifest:
        """Restore a manifest from its `pack`ed bytes. Raises `CodecError`."""
        raw = unpack(data, PackedManifest)
        manifest = cls(
            tensors=TensorTable.unpack(raw.tensors),
            piece_tensor=column(raw.piece_tensor, "<i4", "piece_tensor").astype(np.int32),
            piece_start=column(raw.piece_start, "<i8", "piece_start"),
            piece_count=column(raw.piece_count, "<i8", "piece_count"),
            piece_offset=column(raw.piece_offset, "<i8", "piece_offset"),
            bucket_first=column(raw.bucket_first, "<i8", "bucket_first"),
            bucket_nbytes=column(raw.bucket_nbytes, "<i8", "bucket_nbytes"),
            bucket_owner=column(raw.bucket_owner, "<i4", "bucket_owner").astype(np.int32),
            alignment=raw.alignment,
        )
        if fault := _manifest_fault(manifest):
            raise CodecError(fault)
        manifest.__dict__["_packed"] = data
        return manifest


def _manifest_fault(manifest: Manifest) -> str | None:
    """Say in a sentence what is wrong with a manifest whose table is sound; None if nothing is."""
    m, p, b = manifest, len(manifest.piece_tensor), len(manifest.bucket_nbytes)
    if not 1 <= m.alignment <= _MAX_ALIGNMENT:
        return f"alignment {m.alignment} is not between 1 and {_MAX_ALIGNMENT}"
    if p > MAX_PIECES:
        return f"{p} pieces, more than {MAX_PIECES}"
    if not len(m.piece_start) == len(m.piece_count) == len(m.piece_offset) == p or len(m.bucket_owner) != b:
        return "a manifest's columns have different lengths"
    first = m.bucket_first
    in_range = bool(((first >= 0) & (first <= p)).all())  # otherwise `np.diff` could wrap around
    if len(first) != b + 1 or first[0] != 0 or first[-1] != p or not in_range or not (np.diff(first) > 0).all():
        return "buckets do not share out the pieces in order, at least one each"
    if not p:
        return "a tensor that is not empty has no piece" if m.tensors.sizes.any() else None
    if int(m.piece_tensor.min()) < 0 or int(m.piece_tensor.max()) >= len(m.tensors):
        return "a piece belongs to a tensor that is not there"
    if int(m.bucket_owner.min()) < 0:
        return "a bucket has a negative owner"
    if int(m.bucket_nbytes.min()) < 1 or int(m.bucket_nbytes.max()) > MAX_TOTAL_BYTES:
        return "a bucket's size is out of range"
    numel = m.tensors.numels[m.piece_tensor]
    if not ((m.piece_start >= 0) & (m.piece_count > 0) & (m.piece_count <= numel - m.piece_start)).all():
        return "a piece lies outside its tensor"
    # In tensor order, each piece starts where the one before it ended; every tensor's pieces end at its end.
    same = np.diff(m.piece_tensor) == 0
    ends = m.piece_start + m.piece_count
    starts_right = np.concatenate([[m.piece_start[0] == 0], m.piece_start[1:] == np.where(same, ends[:-1], 0)])
    ends_right = ends[np.concatenate([~same, [True]])] == numel[np.concatenate([~same, [True]])]
    covered = np.zeros(len(m.tensors), dtype=np.bool_)
    covered[m.piece_tensor] = True
    if (np.diff(m.piece_tensor) < 0).any() or not starts_right.all() or not ends_right.all():
        return "pieces do not cover their tensors once and in order"
    if not (covered | (m.tensors.numels == 0)).all():
        return f"tensor {m.tensors.names[int(np.argmin(covered | (m.tensors.numels == 0)))]!r} has no piece"
    if not flat_boxes(m.tensors.dims[m.piece_tensor], m.piece_start, m.piece_count)[2].all():
        return "a piece is not a box"
    limit = m.bucket_nbytes[m.piece_bucket]
    if not ((m.piece_offset >= 0) & (m.piece_offset <= limit - m.piece_nbytes)).all():
        return "a piece lies outside its bucket"
    if (m.piece_offset % m.alignment).any():
        return f"a piece does not start at a multiple of {m.alignment} bytes"
    neighbours = np.diff(m.piece_bucket) == 0
    if not (~neighbours | (m.piece_offset[1:] >= (m.piece_offset + m.piece_nbytes)[:-1])).all():
        return "pieces of a bucket overlap or are out of order"
    return None
