"""The element types a shard may have: torch's names, safetensors' names, bytes per element. Pure; no torch needed."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BY_CODE", "BY_NAME", "BY_SAFETENSORS", "Dtype", "dtype_named"]

from weightsync.errors import SourceError


class Dtype(NamedTuple):
    """One element type. `code` stands for it on the wire and never changes its meaning."""

    code: int
    name: str  # as in `torch.bfloat16`
    safetensors: str | None
    itemsize: int  # bytes


_ALL = (
    Dtype(1, "float32", "F32", 4),
    Dtype(2, "float16", "F16", 2),
    Dtype(3, "bfloat16", "BF16", 2),
    Dtype(4, "float64", "F64", 8),
    Dtype(5, "float8_e4m3fn", "F8_E4M3", 1),
    Dtype(6, "float8_e5m2", "F8_E5M2", 1),
    Dtype(7, "float8_e8m0fnu", "F8_E8M0", 1),
    Dtype(8, "int8", "I8", 1),
    Dtype(9, "uint8", "U8", 1),
    Dtype(10, "int16", "I16", 2),
    Dtype(11, "int32", "I32", 4),
    Dtype(12, "int64", "I64", 8),
    Dtype(13, "bool", "BOOL", 1),
    Dtype(14, "float8_e4m3fnuz", None, 1),
    Dtype(15, "float8_e5m2fnuz", None, 1),
)
BY_CODE = {d.code: d for d in _ALL}
BY_NAME = {d.name: d for d in _ALL}
BY_SAFETENSORS = {d.safetensors: d for d in _ALL if d.safetensors is not None}


def dtype_named(name: str, tensor: str) -> Dtype:
    """The element type called `name` (torch's name, `torch.` or not). Raises `SourceError` naming `tensor`."""
    found = BY_NAME.get(name.removeprefix("torch."))
    if found is None:
        known = ", ".join(d.name for d in _ALL)
        raise SourceError(f"tensor {tensor!r} has dtype {name}, which cannot be pushed", hint=f"one of: {known}")
    return found
