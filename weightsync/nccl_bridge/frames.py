"""Commands and replies as frames on the pipe between the daemon and a bridge.

A frame is a little-endian u32 length and a MessagePack map, either a `Request` or a `Response`. Both ends are processes
of one user and one installation, so nothing is negotiated. Bytes are bounded and validated all the same: a half-written
frame of a killed process must be an error and not a strange command.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from weightsync.errors import CodecError, ErrorRecord
from weightsync.nccl_bridge.commands import AnyCommand
from weightsync.nccl_bridge.replies import AnyReply, Natural

__all__ = [
    "HEADER",
    "MAX_FRAME",
    "Request",
    "Response",
    "decode_request",
    "decode_response",
    "encode",
    "frame_length",
]

MAX_FRAME = 2**28  # bytes; a `Prepare` may tell where each of a model's tensors lies, and there may be 100,000
HEADER = struct.Struct("<I")


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A command on the pipe. The bridge answers within `timeout` seconds of reading it."""

    id: Natural
    timeout: Annotated[float, Meta(ge=0, le=1e6)]
    command: AnyCommand


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the request of the same `id`: a reply or an error, never both."""

    id: Natural
    reply: AnyReply | None = None
    error: ErrorRecord | None = None


def encode(message: Request | Response) -> bytes:
    """Return the frame of one message, header included. Raises `CodecError` if it is larger than `MAX_FRAME`."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME:
        raise CodecError(f"a frame of {len(body)} bytes is larger than {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Bytes that follow a header of `HEADER.size` bytes. Raises `CodecError` outside 1 … `MAX_FRAME`."""
    (length,) = HEADER.unpack(header)
    if not 1 <= length <= MAX_FRAME:
        raise CodecError(f"a frame header announces {length} bytes; 1 … {MAX_FRAME} are allowed")
    return int(length)


def decode_request(body: bytes) -> Request:
    """Return the request in a frame's body. Raises `CodecError` only."""
    return _decode(body, Request)


def decode_response(body: bytes) -> Response:
    """Return the response in a frame's body. Raises `CodecError` only."""
    response = _decode(body, Response)
    if (response.reply is None) == (response.error is None):
        raise CodecError("a response holds either a reply or an error")
    return response


M = TypeVar("M", Request, Response)


def _decode(body: bytes, kind: type[M]) -> M:
    try:
        plain = msgpack.unpackb(body, strict_map_key=True, max_array_len=8192, max_map_len=8192, max_ext_len=0)
        return msgspec.convert(plain, kind)
    except (ValueError, TypeError, RecursionError, msgspec.ValidationError) as error:
        raise CodecError(f"no {kind.__name__.lower()} of a bridge: {error}") from error
