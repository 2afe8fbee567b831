"""Packs columns and small maps as MessagePack bytes, and unpacks bytes of any origin. Raises only `CodecError`."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from weightsync.errors import CodecError

if TYPE_CHECKING:
    import numpy.typing as npt

    from weightsync.plan.boxes import Ints

__all__ = ["DIGEST_BYTES", "FORMAT", "Packed", "column", "digest_of", "frozen", "pack", "unpack"]

DIGEST_BYTES = 16
FORMAT = 1  # of everything packed here; rises when the meaning of a column changes

_Array = TypeVar("_Array", bound="npt.NDArray[np.generic]")
_Raw = TypeVar("_Raw", bound="Packed")


class Packed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One packed object: a few numbers and binary columns."""

    format: int


def pack(raw: Packed) -> bytes:
    """Encode the struct as one MessagePack map."""
    return msgspec.msgpack.encode(raw)


def unpack(data: bytes, kind: type[_Raw]) -> _Raw:
    """Decode a struct of this `kind`, without checking its columns. Raises `CodecError`."""
    try:
        raw = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"not a packed {kind.__name__.removeprefix('Packed').lower()}: {error}") from error
    if raw.format != FORMAT:
        raise CodecError(f"packed in format {raw.format}; this version reads format {FORMAT}")
    return raw


def column(data: bytes, dtype: str, name: str) -> Ints:
    """Decode a column of little-endian integers as int64. Raises `CodecError` if the last integer is cut short."""
    kind = np.dtype(dtype)
    if len(data) % kind.itemsize:
        raise CodecError(f"column {name} has {len(data)} bytes, not a multiple of {kind.itemsize}")
    return np.frombuffer(data, dtype=kind).astype(np.int64)


def digest_of(packed: bytes) -> bytes:
    """16 bytes that stand for `packed`."""
    return blake2b(packed, digest_size=DIGEST_BYTES).digest()


def frozen(array: _Array) -> _Array:
    """The same array, made read-only."""
    array.flags.writeable = False
    return array
