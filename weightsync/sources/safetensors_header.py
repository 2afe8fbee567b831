"""Reads and checks the headers of safetensors files, and the index of several files: any of them may be damaged.

A file is 8 bytes with the length of a JSON object (little-endian), that object, then the data. The object maps each
tensor's name to its dtype, shape and `data_offsets`, [begin, end) in the data.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsync.errors import SourceError
from weightsync.plan.dtypes import BY_SAFETENSORS, Dtype

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["StoredTensor", "files_of", "read_header", "read_index"]

_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_MAX_INDEX = 1 << 30


class StoredTensor(NamedTuple):
    """Where in its file a tensor lies."""

    dtype: Dtype
    shape: tuple[int, ...]
    begin: int  # byte in the file


def read_header(descriptor: int, file: Path) -> dict[str, StoredTensor]:
    """The tensors of an open file. Raises `SourceError` naming file and tensor where the header is not sound."""
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
        raise SourceError(
            f"{file} is no safetensors file, or is cut short: its header does not fit in its {size} bytes"
        )
    header = _json_object(os.pread(descriptor, length, 8), file)
    header.pop("__metadata__", None)
    data = 8 + length
    return {name: _stored(file, name, entry, data, size) for name, entry in header.items()}


def _stored(file: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    what = f"tensor {name!r} in {file}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise SourceError(f"{what} lacks dtype, shape or data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = BY_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(BY_SAFETENSORS)
        raise SourceError(f"{what} has dtype {entry['dtype']!r}, which cannot be pushed", hint=f"one of: {known}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise SourceError(f"{what} has shape {shape!r} and data_offsets {offsets!r}: not lists of whole numbers")
    begin, end = offsets
    if not begin <= end <= size - data:
        raise SourceError(f"{what} has data_offsets {begin} to {end}, but the file holds {size - data} bytes of data")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise SourceError(f"{what} has {end - begin} bytes, which {dtype.name} of shape {tuple(shape)} has not")
    return StoredTensor(dtype, tuple(shape), data + begin)


def read_index(index: Path) -> dict[str, str]:
    """File name by tensor of a `model.safetensors.index.json`. Raises `SourceError` where it is not sound."""
    try:
        with index.open("rb") as file:
            data = file.read(_MAX_INDEX)
    except OSError as error:
        raise SourceError(f"cannot read {index}: {error.strerror}") from error
    files = _json_object(data, index).get("weight_map")
    if not isinstance(files, dict):
        raise SourceError(f"{index} has no weight_map")
    for name, file_name in files.items():
        # A bare file name only: the files lie beside the index.
        if not isinstance(file_name, str) or os.path.basename(file_name) != file_name or file_name in ("", ".", ".."):
            raise SourceError(
                f"{index} says that tensor {name!r} is in {file_name!r}, which is no name of a file beside it"
            )
    return files


def _json_object(data: bytes, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise SourceError(f"{file} does not hold the JSON it should: {error}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{file} does not hold a JSON object where it should")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} occurs twice")
            seen.add(name)
    return unique


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 62 for number in value)


def files_of(path: Path) -> list[tuple[Path, list[str] | None]]:
    """List a checkpoint's files, each with the tensors to take from it, or None for all. Raises `SourceError`."""
    if path.is_file():
        return [(path, None)]
    if (single := path / "model.safetensors").is_file():
        return [(single, None)]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        raise SourceError(
            f"{path} is no safetensors checkpoint",
            hint="give a directory with model.safetensors or model.safetensors.index.json, or a .safetensors file",
        )
    by_file: dict[str, list[str]] = {}
    for name, file in read_index(index).items():
        by_file.setdefault(file, []).append(name)
    return [(path / file, wanted) for file, wanted in by_file.items()]
