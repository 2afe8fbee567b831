"""Which tensors are sent as float8_e4m3fn, and with which scales: by rules, or as a quantised checkpoint has them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsync.errors import SourceError
from weightsync.sources.grid import Grid
from weightsync.sources.safetensors_header import StoredTensor, files_of, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["KEEP", "Fp8"]

KEEP = ("*embed*", "*lm_head*", "*norm*", "*.gate", "*.router", "*shared_expert_gate")
"""Modules that fp8 checkpoints leave as they are: engines make no fp8 layer of them."""

_BLOCK_SCALE, _TENSOR_SCALE = "_scale_inv", "_scale"  # after the weight's name, as vLLM's and SGLang's loaders expect
_SCALES = ("float32", "bfloat16", "float16")  # in a checkpoint; engines hold float32, and are sent float32


@dataclass(frozen=True)
class Fp8:
    """Sends bfloat16, float16 and float32 weights as float8_e4m3fn, each with a float32 tensor of its scales.

    block: rows and columns that share a scale, which is sent as `….weight_scale_inv`; None: one scale for a whole
        matrix, `….weight_scale`.
    keep: modules and tensors that are not quantised, by name or shell pattern. Of the others, matrices called
        `….weight` and stacks of expert matrices are sent as float8.
    ue8m0: scales are rounded up to powers of two (`"scale_fmt": "ue8m0"` in a checkpoint's config.json).
    all_reduce: if several ranks hold elements that share a scale, find their maximum in a collective over the ranks
        of the push. Without it such weights are refused, and no collective runs.
    """

    block: tuple[int, int] | None = (128, 128)
    keep: tuple[str, ...] = KEEP
    ue8m0: bool = False
    all_reduce: bool = False
    _like: _Like | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises `SourceError` for a block that is not two positive numbers."""
        keep: Any = self.keep
        object.__setattr__(self, "keep", (keep,) if isinstance(keep, str) else tuple(keep))
        sides: Any = self.block
        if sides is not None:
            numbers = isinstance(sides, tuple | list) and all(type(side) is int and side > 0 for side in sides)
            if not numbers or len(sides) != 2:
                raise SourceError(f"block = {self.block!r} is no block of a matrix", hint="(128, 128), say, or None")
            object.__setattr__(self, "block", tuple(sides))

    @classmethod
    def like(cls, checkpoint: str | os.PathLike[str], *, all_reduce: bool = False) -> Fp8:
        """Quantise like a checkpoint on disk: exactly the tensors that it has scales for, with its blocks.

        checkpoint: the directory that engines were started on, with `config.json` and safetensors files. Only the
        files' headers are read. Raises `SourceError` if it is quantised in a way that is not supported.
        """
        directory = Path(checkpoint)
        files = [directory / name for name in ("config.json", "model.safetensors.index.json", "model.safetensors")]
        stamps = tuple([(info.st_mtime_ns, info.st_size) for info in map(os.stat, filter(os.path.exists, files))])
        block, ue8m0, like = _read(str(directory), stamps)
        return cls(block, (), ue8m0, all_reduce, like)

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """Return the blocks into which a quantised tensor of this shape is cut."""
        return Grid.of(shape, self.block, scalar=self._like is not None and self._like.scalar)

    def scale_of(self, name: str) -> str:
        """Return the name of a tensor's scales."""
        return name + (_TENSOR_SCALE if self.block is None else _BLOCK_SCALE)

    def quantises(self, names: Iterable[str], shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is sent as float8. `names` are all its names, if it is tied.

        A tensor stays as it is if one of its names is kept. Raises `SourceError` if a checkpoint is to be followed that
        lacks the tensor, or has it in another shape.
        """
        if self._like is not None:
            return self._like.quantises(tuple(names), shape)
        return all(_is_matrix(name, shape) and not self._kept(name) for name in names)

    def _kept(self, name: str) -> bool:
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]  # its modules, outermost first, and itself
        return any(fnmatchcase(one, pattern) for pattern in self.keep for one in above)


@dataclass(frozen=True, eq=False)
class _Like:
    """The tensors of a quantised checkpoint."""

    directory: str
    quantised: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    scalar: bool  # the scale of a matrix has no dimensions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Like) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.directory, self.quantised))

    def quantises(self, names: tuple[str, ...], shape: tuple[int, ...]) -> bool:
        there = [name for name in names if name in self.shapes]
        if not there:
            near = get_close_matches(names[0], self.shapes, 3, 0.4) or sorted(self.shapes)[:3]
            raise SourceError(
                f"{self.directory} has no tensor {names[0]!r}, and so does not say whether it is quantised",
                hint=f"it has {', '.join(map(repr, near))}; `rename` or `only` may be missing, or say it by Fp8(…)",
            )
        for name in there:
            if self.shapes[name] != shape:
                raise SourceError(f"tensor {name!r} is {shape}, and {self.shapes[name]} in {self.directory}")
        return all(name in self.quantised for name in there)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    stacked = len(shape) == 3 and ".experts." in name
    return stacked or (len(shape) == 2 and name.endswith(".weight"))


@lru_cache(maxsize=8)
def _read(path: str, stamps: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int] | None, bool, _Like]:
    """Return the block, whether scales are powers of two, and the tensors of a checkpoint.

    `stamps` change when its files do, so that the cache does not return an older answer.
    """
    directory = Path(path)
    block, ue8m0 = _scheme(_config(directory), directory)
    stored = _headers(directory)
    suffix = _TENSOR_SCALE if block is None else _BLOCK_SCALE
    quantised = frozenset(name for name in stored if name + suffix in stored)
    if not quantised:
        raise SourceError(
            f"{directory} has no tensor with scales called `…{suffix}` beside it",
            hint="give the checkpoint that the engines serve, or say what is quantised by Fp8(…)",
        )
    scalar = block is None and all(stored[name + suffix].shape == () for name in quantised)
    for name in sorted(quantised):
        weight, scale = stored[name], stored[name + suffix]
        if weight.dtype.name != "float8_e4m3fn" or scale.dtype.name not in _SCALES or len(weight.shape) < 2:
            raise SourceError(
                f"tensor {name!r} of {directory} is {weight.dtype.name} with scales of {scale.dtype.name}",
                hint="matrices of float8_e4m3fn with scales of float32 or bfloat16 are what can be made here",
            )
        wanted = Grid.of(weight.shape, block, scalar=scalar).scale_shape
        if scale.shape != wanted:
            raise SourceError(f"the scales of {name!r} in {directory} are {scale.shape}, and {wanted} is known here")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    return block, ue8m0, _Like(str(directory), quantised, shapes, scalar)


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise SourceError(
            f"cannot read {file}: {error.strerror}", hint="give the directory of a checkpoint that is quantised to fp8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} does not hold the JSON it should: {error}") from error
    config = found.get("quantization_config") if isinstance(found, dict) else None
    if not isinstance(config, dict):
        raise SourceError(
            f"{file} has no quantization_config: that checkpoint is not quantised",
            hint="give the fp8 checkpoint that the engines serve, or say what is quantised by Fp8(…)",
        )
    return config


def _scheme(config: dict[str, Any], directory: Path) -> tuple[tuple[int, int] | None, bool]:
    """Return the block that a configuration says, and whether scales are powers of two."""
    method, block, scales = (config.get(key) for key in ("quant_method", "weight_block_size", "scale_fmt"))
    if method != "fp8" or config.get("activation_scheme", "dynamic") != "dynamic" or scales not in (None, "ue8m0"):
        told = {key: value for key, value in config.items() if isinstance(value, str)}
        raise SourceError(
            f"{directory} is quantised by {told}, which is not known here",
            hint='quant_method "fp8", activation_scheme "dynamic", scale_fmt "ue8m0" or none',
        )
    try:
        return Fp8(block).block, scales == "ue8m0"
    except SourceError as error:
        raise SourceError(
            f"weight_block_size = {block!r} in {directory / 'config.json'} is no block of a matrix",
            hint="a pair, such as [128, 128]",
        ) from error


def _headers(directory: Path) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file, wanted in files_of(directory):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"cannot open {file}: {error.strerror}") from error
        try:
            header = read_header(descriptor, file)
        finally:
            os.close(descriptor)
        found |= {name: header[name] for name in (header if wanted is None else wanted) if name in header}
    return found
