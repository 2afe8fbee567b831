"""What a trainer rank shows of its own memory, so that engines read their weights where they lie.

A rank that exposes names its *regions*, stretches of memory that other processes of the node can map, and says of each
part of a tensor that it is to give where that lies in one of them. Nothing here touches memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from weightsync.errors import CodecError
from weightsync.plan.boxes import Ints, as_tuples, pad_shapes
from weightsync.plan.packing import FORMAT, Packed, column, digest_of, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from weightsync.plan.table import TensorTable

__all__ = ["Exposure", "Exposures", "Part", "Region", "gpu_of"]

_MAX_REGIONS = 1 << 16


class Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory of the exposing process, in the words of `weightsync.ipc.regions`."""

    nbytes: Annotated[int, Meta(ge=1, le=2**50)]
    gpu: Annotated[str, Meta(max_length=64)] = ""  # UUID; "" for host memory
    handle: Annotated[bytes, Meta(max_length=64)] = b""  # cudaIpcMemHandle_t of the allocation
    serial: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  # tells it from a later allocation at the same address
    fd: Annotated[int, Meta(ge=-1, lt=2**31)] = -1  # of the process: a memfd
    name: Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9-]*$")] = ""  # of that


class Part(msgspec.Struct, frozen=True):
    """A box of a tensor of the manifest, and where it lies."""

    tensor: int
    offset: tuple[int, ...]  # in the tensor, in elements
    shape: tuple[int, ...]
    region: int
    at: int  # byte of the region at which its first element lies
    strides: tuple[int, ...]  # bytes


class PackedExposure(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pid: Annotated[int, Meta(ge=0, lt=2**31)]
    started: Annotated[str, Meta(max_length=32)]
    regions: Annotated[tuple[Region, ...], Meta(max_length=_MAX_REGIONS)]
    tensor: bytes  # int32, all columns little-endian
    region: bytes  # int32
    at: bytes  # int64, as all that follow
    offset: bytes  # rows of as many dimensions as the widest tensor has
    shape: bytes
    strides: bytes


@dataclass(frozen=True, eq=False)
class Exposure:
    """Of one rank, for pushes of one manifest. D is the `width` of the manifest's tensors; unused dimensions have
    offset 0, shape 1 and stride 0. Constructed directly it trusts its arguments.
    """

    pid: int  # of the exposing process
    started: str  # when that began, as `weightsync.processes` tells
    regions: tuple[Region, ...]
    tensor: npt.NDArray[np.int32]  # [n] index of the tensor in the manifest
    region: npt.NDArray[np.int32]  # [n]
    at: Ints  # [n]
    offset: Ints  # [n, D]
    shape: Ints  # [n, D]
    strides: Ints  # [n, D]

    def __len__(self) -> int:
        return len(self.tensor)

    @classmethod
    def of(cls, pid: int, started: str, regions: Sequence[Region], parts: Sequence[Part], width: int) -> Exposure:
        """These parts."""
        return cls(
            pid,
            started,
            tuple(regions),
            np.array([part.tensor for part in parts], dtype=np.int32),
            np.array([part.region for part in parts], dtype=np.int32),
            np.array([part.at for part in parts], dtype=np.int64),
            pad_shapes([part.offset for part in parts], width, 0),
            pad_shapes([part.shape for part in parts], width, 1),
            pad_shapes([part.strides for part in parts], width, 0),
        )

    @cached_property
    def packed(self) -> bytes:
        """As bytes, for `unpack`."""
        columns = {name: getattr(self, name).astype("<i8").tobytes() for name in ("at", "offset", "shape", "strides")}
        return pack(
            PackedExposure(
                format=FORMAT,
                pid=self.pid,
                started=self.started,
                regions=self.regions,
                tensor=self.tensor.astype("<i4").tobytes(),
                region=self.region.astype("<i4").tobytes(),
                **columns,
            )
        )

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell it from any other."""
        return digest_of(self.packed)

    @cached_property
    def shapes_digest(self) -> bytes:
        """16 bytes that say which parts there are, and how their elements lie; not where."""
        return digest_of(b"".join(one.tobytes() for one in (self.tensor, self.offset, self.shape, self.strides)))

    @cached_property
    def parts_digest(self) -> bytes:
        """16 bytes that say which parts there are, and where in which region; not what the regions are."""
        columns = (self.tensor, self.region, self.at, self.offset, self.shape, self.strides)
        return digest_of(b"".join(one.tobytes() for one in columns))

    def addresses(self, regions: Ints) -> Ints:
        """Where each part begins, [n], if regions begin at these addresses, int64 [regions]."""
        found: Ints = regions[self.region] + self.at
        return found

    @classmethod
    def unpack(cls, data: bytes, tensors: TensorTable) -> Exposure:
        """What `packed` was, of a manifest of these tensors. Raises `CodecError` also where a part would not lie in its
        region: whoever reads it need not look again.
        """
        raw = unpack(data, PackedExposure)
        tensor, region = column(raw.tensor, "<i4", "tensor"), column(raw.region, "<i4", "region")
        count, width = len(tensor), tensors.width
        at = column(raw.at, "<i8", "at")
        wide = [column(getattr(raw, name), "<i8", name) for name in ("offset", "shape", "strides")]
        if not len(region) == len(at) == count or any(len(rows) != count * width for rows in wide):
            raise CodecError("the columns of an exposure have different lengths")
        if count and not 0 <= int(tensor.min()) <= int(tensor.max()) < len(tensors):
            raise CodecError("an exposed part belongs to a tensor that is not there")
        if count and not 0 <= int(region.min()) <= int(region.max()) < len(raw.regions):
            raise CodecError("an exposed part lies in a region that is not there")
        offset, shape, strides = (rows.reshape(count, width) for rows in wide)
        dims, size = tensors.dims[tensor], tensors.itemsizes[tensor]
        inside = ((offset >= 0) & (offset <= dims) & (shape >= 1) & (shape <= dims - offset)).all(axis=1)
        nbytes = np.array([one.nbytes for one in raw.regions], dtype=np.int64)[region]
        inside &= ((strides >= 0) & (strides <= nbytes[:, None])).all(axis=1)
        # as floats: what would overflow must not wrap around to something that fits
        end = at + ((shape - 1).astype(float) * strides).sum(axis=1) + size
        inside &= (at >= 0) & (end <= nbytes)
        if not inside.all():
            name = tensors.names[int(tensor[np.argmin(inside)])]
            raise CodecError(f"an exposed part of {name!r} does not lie in that tensor, or not in its region")
        kinds = (tensor.astype(np.int32), region.astype(np.int32))
        exposure = cls(raw.pid, raw.started, raw.regions, *kinds, at, offset, shape, strides)
        exposure.__dict__["packed"] = data
        return exposure

    def parts(self, tensors: TensorTable) -> list[Part]:
        """Each as an object of its own; tensors without dimensions have parts without any."""
        ndims = tensors.ndims[self.tensor]
        offset, shape, strides = (as_tuples(rows, ndims) for rows in (self.offset, self.shape, self.strides))
        columns = (self.tensor.tolist(), offset, shape, self.region.tolist(), self.at.tolist(), strides)
        return [Part(*one) for one in zip(*columns, strict=True)]


class _Regions(msgspec.Struct, frozen=True):
    """As much of a `PackedExposure` as `gpu_of` needs."""

    regions: tuple[Region, ...]


def gpu_of(packed: bytes) -> str:
    """UUID of the GPU on which a packed exposure begins; "" for host memory. Raises `CodecError`."""
    try:
        regions = msgspec.msgpack.decode(packed, type=_Regions).regions
    except msgspec.DecodeError as error:
        raise CodecError(f"no exposure: {error}") from error
    return regions[0].gpu if regions else ""


class PackedExposures(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    ranks: Annotated[tuple[bytes, ...], Meta(max_length=2**20)]


@dataclass(frozen=True)
class Exposures:
    """Those of all ranks of a trainer, packed, as a daemon passes them on."""

    ranks: tuple[bytes, ...]
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, ranks: Sequence[bytes]) -> Exposures:
        """These, by rank."""
        return cls(tuple(ranks), tuple(map(digest_of, ranks)))

    @property
    def digest(self) -> bytes:
        """16 bytes that tell them from any others."""
        return digest_of(b"".join(self.digests))

    def pack(self) -> bytes:
        """As bytes, for `unpack`."""
        return pack(PackedExposures(format=FORMAT, ranks=self.ranks))

    @classmethod
    def unpack(cls, data: bytes) -> Exposures:
        """What `pack` turned into `data`, each rank's not looked at. Raises `CodecError`."""
        return cls.of(unpack(data, PackedExposures).ranks)
