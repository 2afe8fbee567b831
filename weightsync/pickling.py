"""Writes pickles of objects that are not imported here: torch's rebuild functions and dtypes, and plain containers.

Stock engines take handles as pickles. The daemon neither imports torch nor unpickles anything. It writes the names of
the functions that the engine's own unpickler will call:

    dumps([Call(Global("torch.multiprocessing.reductions", "rebuild_cuda_tensor"), args)])

Protocol 4 without a memo: every value is written in full each time, so no two lists are the same object.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Global", "dumps", "namespace"]


@dataclass(frozen=True)
class Global:
    """The object called `name` in `module`, such as a function, a class or `torch.bfloat16`."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """The result of `function(*args)`, called by the unpickler; `state` then becomes its attributes."""

    function: Global
    args: tuple[Any, ...]
    state: Any = field(default=None)


def namespace(**attributes: Any) -> Call:
    """Return a `types.SimpleNamespace`, which every unpickler that SGLang has had lets through."""
    return Call(Global("types", "SimpleNamespace"), (), attributes)


def dumps(value: Any) -> bytes:
    """Return the pickle of None, bool, int, float, str, bytes, list, tuple, dict, `Global` and `Call`, nested at will.

    Raises `TypeError` for anything else.
    """
    out = bytearray(b"\x80\x04")
    _write(out, value)
    out += b"."
    return bytes(out)


def _write(out: bytearray, value: Any) -> None:
    match value:
        case None:
            out += b"N"
        case bool():
            out += b"\x88" if value else b"\x89"
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 255:
                raise TypeError("an integer of more than 255 bytes cannot be pickled here")
            out += b"\x8a" + bytes([len(raw)]) + raw
        case float():
            out += b"G" + struct.pack(">d", value)
        case str():
            raw = value.encode()
            out += b"X" + struct.pack("<I", len(raw)) + raw
        case bytes():
            out += b"B" + struct.pack("<I", len(value)) + value
        case list():
            out += b"]("
            for item in value:
                _write(out, item)
            out += b"e"
        case tuple():
            out += b"("
            for item in value:
                _write(out, item)
            out += b"t"
        case dict():
            out += b"}("
            for key, item in value.items():
                _write(out, key)
                _write(out, item)
            out += b"u"
        case Global():
            if "\n" in value.module + value.name:
                raise TypeError("a name with a line break cannot be pickled")
            out += b"c" + f"{value.module}\n{value.name}\n".encode()
        case Call():
            _write(out, value.function)
            _write(out, value.args)
            out += b"R"
            if value.state is not None:
                _write(out, value.state)
                out += b"b"
        case _:
            raise TypeError(f"a {type(value).__name__} cannot be pickled here")
