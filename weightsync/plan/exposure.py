"""What a trainer rank shows of its own memory, so that engines read weights where they lie.

The rank names its *regions*: stretches of memory that other processes of the node can map. For each part of a tensor
that it gives, it says where the part lies in which region. Engine ranks show their places in the same form. Nothing
here touches memory.
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
    """Memory of the exposing process, as `weightsync.ipc.regions` maps it."""

    nbytes: Annotated[int, Meta(ge=1, le=2**50)]
    gpu: Annotated[str, Meta(max_length=64)] = ""  # UUID; "" for host memory
    handle: Annotated[bytes, Meta(max_length=64)] = b""  # cudaIpcMemHandle_t of the allocation
    serial: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  # tells this allocation from a later one at the same address
    fd: Annotated[int, Meta(ge=-1, lt=2**31)] = -1  # descriptor of a memfd in the exposing process
    name: Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9-]*$")] = ""  # of the memfd


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
    at: bytes  # int64, like all columns below
    offset: bytes  # rows are as wide as the widest tensor
    shape: bytes
    strides: bytes


@dataclass(frozen=True, eq=False)
class Exposure:
    """What one rank exposes for pushes of one manifest.

    D is the `width` of the manifest's tensors. Unused dimensions have offset 0, shape 1 and stride 0. The constructor
    trusts its arguments.
    """

    pid: int  # of the exposing process
    started: str  # when that process began, as `weightsync.processes` says
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
        """Make an exposure of these parts; `width` is D."""
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
        """This exposure as bytes, for `unpack`."""
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
        """16 bytes that tell this exposure from any other."""
        return digest_of(self.packed)

    @cached_property
    def shapes_digest(self) -> bytes:
        """16 bytes that tell which parts there are and their strides, but not where they lie."""
        return digest_of(b"".join(one.tobytes() for one in (self.tensor, self.offset, self.shape, self.strides)))

    @cached_property
    def parts_digest(self) -> bytes:
        """16 bytes that tell which parts there are and where in which region, but not what the regions are."""
        columns = (self.tensor, self.region, self.at, self.offset, self.shape, self.strides)
        return digest_of(b"".join(one.tobytes() for one in columns))

    def addresses(self, regions: Ints) -> Ints:
        """Return the address of each part, [n], from the address of each region, int64 [regions]."""
        found: Ints = regions[self.region] + self.at
        return found

    @classmethod
    def unpack(cls, data: bytes, tensors: TensorTable) -> Exposure:
        """Restore an exposure of parts of these tensors from its `packed` bytes.

        Raises `CodecError`, also if a part would not lie in its region: readers need not check again.
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
        # in floats, so that an overflow cannot wrap around to an end that fits
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
        """Return the parts as objects. Parts of scalar tensors have no dimensions."""
        ndims = tensors.ndims[self.tensor]
        offset, shape, strides = (as_tuples(rows, ndims) for rows in (self.offset, self.shape, self.strides))
        columns = (self.tensor.tolist(), offset, shape, self.region.tolist(), self.at.tolist(), strides)
        return [Part(*one) for one in zip(*columns, strict=True)]


class _Regions(msgspec.Struct, frozen=True):
    """The one field of a `PackedExposure` that `gpu_of` needs."""

    regions: tuple[Region, ...]


def gpu_of(packed: bytes) -> str:
    """Return the UUID of the GPU of a packed exposure's first region; "" for host memory. Raises `CodecError`."""
    try:
        regions = msgspec.msgpack.decode(packed, type=_Regions).regions
    except msgspec.DecodeError as error:
        raise CodecError(f"no exposure: {error}") from error
    return regions[0].gpu if regions else ""


class PackedExposures(Packed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    ranks: Annotated[tuple[bytes, ...], Meta(max_length=2**20)]


@dataclass(frozen=True)
class Exposures:
    """The packed exposures of all ranks of a trainer, as a daemon passes them on."""

    ranks: tuple[bytes, ...]
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, ranks: Sequence[bytes]) -> Exposures:
        """Take the packed exposure of each rank, in the order of ranks."""
        return cls(tuple(ranks), tuple(map(digest_of, ranks)))

    @property
    def digest(self) -> bytes:
        """16 bytes that tell these exposures from any others."""
        return digest_of(b"".join(self.digests))

    def pack(self) -> bytes:
        """These exposures as bytes, for `unpack`."""
        return pack(PackedExposures(format=FORMAT, ranks=self.ranks))

    @classmethod
    def unpack(cls, data: bytes) -> Exposures:
        """Restore exposures from their `pack`ed bytes, without checking any rank's. Raises `CodecError`."""
        return cls.of(unpack(data, PackedExposures).ranks)
