"""Messages ↔ bytes.

A frame is one MessagePack map. `decode_untrusted` reads bytes that anybody may have sent. It either returns a message
or raises `CodecError`, and allocates no more than a small multiple of the frame. The frame is first walked without
building anything (`_walk`), so that a header that claims a billion elements, or a thousand nested arrays of a thousand
each, costs nothing. Then msgpack decodes it, and msgspec validates it against the struct that its `type` names.
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgpack
import msgspec

from weightsync.errors import CodecError
from weightsync.wire.messages import LARGE, MESSAGES, Message

__all__ = ["MAX_FRAME", "SMALL_FRAME", "VERSION", "VERSIONS", "decode_untrusted", "encode", "plain", "structured"]

VERSION = 1
VERSIONS = (1,)  # protocol versions that this codec reads
MAX_FRAME = 2**28  # bytes; the layout of a million shards is about 40 MB
SMALL_FRAME = 2**20  # bytes; limit for messages that do not grow with the model
MAX_DEPTH = 8
MAX_ITEMS = 1_000_000  # array elements and map entries, all levels together

_TYPES: dict[str, type[Message]] = {str(kind.__struct_config__.tag): kind for kind in MESSAGES}
T = TypeVar("T")


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    body = msgspec.to_builtins(message, builtin_types=(bytes,))
    return msgpack.packb({"v": VERSION, **body}, use_bin_type=True)  # type: ignore[no-any-return]


def decode_untrusted(frame: bytes | memoryview) -> Message:
    """Return the message in a frame from outside. Raises `CodecError` only."""
    if not 1 <= len(frame) <= MAX_FRAME:
        raise CodecError(f"a frame has 1 to {MAX_FRAME} bytes, not {len(frame)}")
    _walk(frame)
    try:
        body = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_bin_len=MAX_FRAME,
            max_str_len=MAX_FRAME,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, TypeError) as error:  # msgpack's own errors are ValueErrors
        raise CodecError(f"not MessagePack: {error or type(error).__name__}") from error
    if not isinstance(body, dict):
        raise CodecError(f"a frame is a map, not {type(body).__name__}")
    version = body.pop("v", None)
    if version.__class__ is not int or version not in VERSIONS:
        spoken = ", ".join(str(v) for v in VERSIONS)
        raise CodecError(f"protocol version {_short(version)} is not spoken here", hint=f"versions spoken: {spoken}")
    name = body.get("type")
    kind = _TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CodecError(f"message type {_short(name)} is unknown to protocol version {version}")
    if len(frame) > SMALL_FRAME and kind not in LARGE:
        raise CodecError(f"a message of type {name} has at most {SMALL_FRAME} bytes, not {len(frame)}")
    return structured(body, kind)


def plain(struct_: msgspec.Struct) -> dict[str, Any]:
    """Return a struct as the maps, arrays, strings, bytes and numbers that MessagePack knows."""
    return msgspec.to_builtins(struct_, builtin_types=(bytes,))  # type: ignore[no-any-return]


def structured(body: Any, kind: type[T]) -> T:
    """Return plain data as a struct. Raises `CodecError` naming the field."""
    try:
        return msgspec.convert(body, kind, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError) as error:
        raise CodecError(f"not a valid {getattr(kind, '__name__', kind)}: {error}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


# --- the walk ------------------------------------------------------------------------------------------------------

# First byte → (bytes of the length field, kind). The length counts bytes ("s"), items ("a") or pairs ("m").
_SIZED: dict[int, tuple[int, str]] = {
    0xC4: (1, "s"),
    0xC5: (2, "s"),
    0xC6: (4, "s"),
    0xD9: (1, "s"),
    0xDA: (2, "s"),
    0xDB: (4, "s"),
    0xDC: (2, "a"),
    0xDD: (4, "a"),
    0xDE: (2, "m"),
    0xDF: (4, "m"),
}
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_FIXED.update({0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8})
_LENGTHS = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}


def _walk(frame: bytes | memoryview) -> None:
    """Check nesting, counts and lengths of exactly one MessagePack object without building any of it."""
    size, at, items = len(frame), 0, 1
    open_counts = [1]  # objects still to come at each level
    while open_counts:
        if open_counts[-1] == 0:
            open_counts.pop()
            continue
        open_counts[-1] -= 1
        if at >= size:
            raise CodecError("the frame ends inside an object")
        first = frame[at]
        at += 1
        children = skip = 0
        if first <= 0x7F or first >= 0xE0:
            continue
        if first <= 0x8F:
            children = 2 * (first & 0x0F)
        elif first <= 0x9F:
            children = first & 0x0F
        elif first <= 0xBF:
            skip = first & 0x1F
        elif first in _FIXED:
            skip = _FIXED[first]
        elif first in _SIZED:
            width, kind = _SIZED[first]
            if at + width > size:
                raise CodecError("the frame ends inside a length")
            (length,) = _LENGTHS[width].unpack_from(frame, at)
            at += width
            if kind == "s":
                skip = length
            else:
                children = length * (2 if kind == "m" else 1)
        else:
            raise CodecError(f"MessagePack type 0x{first:02x} is not used here")
        at += skip
        items += children
        if at > size or children > size - at:
            raise CodecError("a length points past the end of the frame")
        if items > MAX_ITEMS:
            raise CodecError(f"a frame holds at most {MAX_ITEMS} objects")
        if children:
            open_counts.append(children)
            if len(open_counts) > MAX_DEPTH + 1:
                raise CodecError(f"objects are nested deeper than {MAX_DEPTH}")
    if at != size:
        raise CodecError(f"{size - at} bytes follow the message")
