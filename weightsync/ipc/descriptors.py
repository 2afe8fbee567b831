"""Offers and tickets as bytes, and the checksum of a bucket.

A descriptor is `b"WS"`, a format version, a kind, the xxh3-64 of kind and body, and a MessagePack map. The hash is no
signature, because control messages are protected themselves. It makes every truncated or altered descriptor a
`CodecError`, so that a damaged one cannot pass for another valid one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias, TypeVar

import msgpack
import msgspec
import xxhash
from msgspec import Meta

from weightsync.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ALGORITHM", "MAX_DESCRIPTOR", "Algorithm", "Natural", "ReaderName", "checksum", "seal", "unseal"]

ALGORITHM: Final = "xxh3-64"
Algorithm: TypeAlias = Literal["xxh3-64", "fingerprint-64", "tensors-64"]
"""How a bucket's checksum was made: over its bytes in host memory; over its bytes on a GPU, as the fingerprint of one
tensor; or by the trainer's ranks, from the fingerprints of the tensors in it (`weightsync.fingerprint.bucket_sum`).
"""
MAX_DESCRIPTOR = 4096  # bytes; a ticket has about 200
_VERSION = 1
_HEAD = struct.Struct("<2sBcQ")
_CHUNK = 4 * 2**20  # bytes hashed at a time: the hash runs at full speed and `between` is called every 0.2 ms

Natural = Annotated[int, Meta(ge=0, lt=2**60)]
ReaderName = Annotated[str, Meta(min_length=1, max_length=256)]
T = TypeVar("T", bound=msgspec.Struct)


def checksum(view: memoryview, between: Callable[[], object] | None = None) -> int:
    """The xxh3-64 of `view`. `between` is called every few MiB and may raise to end the work early.

    The interpreter lock is not held while a chunk is hashed.
    """
    state = xxhash.xxh3_64()
    for start in range(0, len(view), _CHUNK):
        if between is not None:
            between()
        state.update(view[start : start + _CHUNK])
    return int(state.intdigest())


def seal(kind: bytes, body: msgspec.Struct) -> bytes:
    """Return the bytes of a descriptor; `kind` is one byte."""
    packed = msgspec.msgpack.encode(body)
    return _HEAD.pack(b"WS", _VERSION, kind, xxhash.xxh3_64_intdigest(kind + packed)) + packed


def unseal(data: bytes, kind: bytes, shape: type[T]) -> T:
    """Read a descriptor in bytes from outside. Raises `CodecError`, and nothing else, if they are no descriptor."""
    what = shape.__name__
    if not _HEAD.size < len(data) <= MAX_DESCRIPTOR:
        raise CodecError(f"{what}: {len(data)} bytes are no descriptor")
    magic, version, found, digest = _HEAD.unpack_from(data)
    if magic != b"WS" or version != _VERSION:
        raise CodecError(f"{what}: not a descriptor of version {_VERSION}")
    if found != kind:
        raise CodecError(f"{what}: kind {found!r} where {kind!r} belongs")
    packed = data[_HEAD.size :]
    if xxhash.xxh3_64_intdigest(found + packed) != digest:
        raise CodecError(f"{what}: damaged, its checksum differs")
    try:
        return msgspec.convert(msgpack.unpackb(packed, strict_map_key=True), shape)
    except (ValueError, TypeError, RecursionError, msgspec.ValidationError) as error:
        raise CodecError(f"{what}: {error}") from error
