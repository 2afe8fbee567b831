"""The boxes that an engine rank holds of a manifest's tensors, as it reports them to the daemon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import CodecError
from weightsync.plan.boxes import Ints, pad_shapes
from weightsync.plan.packing import FORMAT, Packed, column, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from weightsync.plan.table import TensorTable

__all__ = ["ResidentBoxes"]


class PackedResidents(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    tensor: bytes  # int32, all columns little-endian
    offset: bytes  # int64, rows as wide as the widest tensor
    shape: bytes  # int64
    unseen: bytes = b""  # int32


@dataclass(frozen=True, eq=False)
class ResidentBoxes:
    """Where the residents of one engine rank lie in the tensors of a manifest, in the order of their fingerprints.

    D is the `width` of the manifest's tensors; unused dimensions have offset 0 and shape 1. The constructor trusts its
    arguments.
    """

    tensor: npt.NDArray[np.int32]  # [n] index of the tensor in the manifest
    offset: Ints  # [n, D] in elements of the whole tensor
    shape: Ints  # [n, D]
    unseen: frozenset[int] = frozenset()  # tensors of which the rank has more than these boxes

    def __len__(self) -> int:
        return len(self.tensor)

    @classmethod
    def of(
        cls,
        boxes: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]],
        width: int,
        *,
        unseen: Iterable[int] = (),
    ) -> ResidentBoxes:
        """Take these boxes, each a tensor's index, an offset and a shape; `width` is D."""
        return cls(
            np.array([tensor for tensor, _, _ in boxes], dtype=np.int32),
            pad_shapes([offset for _, offset, _ in boxes], width, 0),
            pad_shapes([shape for _, _, shape in boxes], width, 1),
            frozenset(unseen),
        )

    def pack(self) -> bytes:
        """These boxes as bytes, for `unpack`."""
        return pack(
            PackedResidents(
                format=FORMAT,
                tensor=self.tensor.astype("<i4").tobytes(),
                offset=self.offset.astype("<i8").tobytes(),
                shape=self.shape.astype("<i8").tobytes(),
                unseen=np.array(sorted(self.unseen), dtype="<i4").tobytes(),
            )
        )

    @classmethod
    def unpack(cls, data: bytes, tensors: TensorTable) -> ResidentBoxes:
        """Restore boxes of these tensors of a manifest from their `pack`ed bytes. Raises `CodecError`."""
        raw = unpack(data, PackedResidents)
        tensor = column(raw.tensor, "<i4", "tensor")
        offset, shape = column(raw.offset, "<i8", "offset"), column(raw.shape, "<i8", "shape")
        count, width = len(tensor), tensors.width
        if not len(offset) == len(shape) == count * width:
            raise CodecError("the columns of a rank's residents have different lengths")
        if count and not 0 <= int(tensor.min()) <= int(tensor.max()) < len(tensors):
            raise CodecError("a resident belongs to a tensor that is not there")
        offset, shape = offset.reshape(count, width), shape.reshape(count, width)
        dims = tensors.dims[tensor]
        inside = ((offset >= 0) & (offset <= dims) & (shape >= 1) & (shape <= dims - offset)).all(axis=1)
        if not inside.all():
            name = tensors.names[int(tensor[np.argmin(inside)])]
            raise CodecError(f"a resident of {name!r} is empty or does not lie in that tensor")
        unseen = column(raw.unseen, "<i4", "unseen")
        if len(unseen) and not 0 <= int(unseen.min()) <= int(unseen.max()) < len(tensors):
            raise CodecError("a rank has parts of a tensor that is not there")
        return cls(tensor.astype(np.int32), offset, shape, frozenset(unseen.tolist()))
