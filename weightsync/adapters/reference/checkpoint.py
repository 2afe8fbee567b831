"""Hugging Face safetensors directories: written in files of 1 GB at most, read tensor by tensor or box by box.

A tensor of more than 1 GB has a file of its own.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weightsync.adapters.reference.config import ModelConfig, write_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["OpenCheckpoint", "open_checkpoint", "random_checkpoint", "save_tensors"]

_FILE_BYTES = 1_000_000_000
_INDEX = "model.safetensors.index.json"


def random_checkpoint(
    config: ModelConfig, directory: str | Path, seed: int = 0, dtype: str | None = None, *, scale: float = 0.2
) -> ModelConfig:
    """Write a checkpoint of seeded normal weights with standard deviation `scale`, and return its config.

    `dtype` replaces the config's. A scale of 0.2 is ten times that of an untrained model: logits lie far apart, so that
    greedy tokens differ between versions and do not depend on the last bit. Norm weights are normal around one. Memory
    use stays near the size of one file.
    """
    config = msgspec.structs.replace(config, dtype=dtype or config.dtype, weight_block_size=None)
    kind: torch.dtype = getattr(torch, config.dtype)
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in checkpoint_tensors(config).items():
            drawn = torch.randn(shape, generator=generator)
            yield name, (1 + drawn * 0.1 if len(shape) == 1 else drawn * scale).to(kind)

    save_tensors(tensors(), directory)
    write_config(config, directory)
    return config


def save_tensors(
    tensors: Iterator[tuple[str, torch.Tensor]], directory: str | Path, file_bytes: int = _FILE_BYTES
) -> None:
    """Write tensors as `model.safetensors`, or, beyond `file_bytes`, as several files and their index."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held_bytes
        save_file(held, root / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > file_bytes:
            flush()
        held[name] = tensor.contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (root / "part-0.safetensors").rename(root / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (root / f"part-{number}.safetensors").rename(root / final)
        weight_map.update(dict.fromkeys(names, final))
    (root / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


class OpenCheckpoint:
    """A checkpoint's files, mapped. Use it as a context manager; tensors that were read stay valid afterwards."""

    def __init__(self, directory: Path, files: dict[str, Any], stack: ExitStack) -> None:
        self._directory = directory
        self._files = files
        self._stack = stack

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor. Raises `KeyError` if the checkpoint has no such name."""
        return cast("torch.Tensor", self._file(name).get_tensor(name))

    def read_box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read one box of a tensor; only its rows are read from disk."""
        index = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        return cast("torch.Tensor", self._file(name).get_slice(name)[index])

    def _file(self, name: str) -> Any:
        return self._files[name]

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def open_checkpoint(directory: str | Path, config: ModelConfig) -> OpenCheckpoint:
    """Open a safetensors directory. Raises `ConfigError` unless it has every tensor of `config`, in its shape."""
    root = Path(directory)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in _paths(root):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"cannot read {path}: {error}") from error
            files.update(dict.fromkeys(opened.keys(), opened))
        for name, shape in checkpoint_tensors(config).items():
            if name not in files:
                raise ConfigError(f"checkpoint {root} has no tensor {name!r}", hint="config.json must fit the tensors")
            found = tuple(files[name].get_slice(name).get_shape())
            if found != shape:
                raise ConfigError(
                    f"tensor {name!r} of {root} has shape {list(found)}, config.json says {list(shape)}"
                    f" ({math.prod(shape)} elements)"
                )
        return OpenCheckpoint(root, files, stack.pop_all())


def _paths(root: Path) -> list[Path]:
    index = root / _INDEX
    if not index.exists():
        paths = sorted(root.glob("*.safetensors"))
        if not paths:
            raise ConfigError(f"{root} holds no *.safetensors", hint="--load-format dummy starts without weights")
        return paths
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index} is no safetensors index: {error!r}") from error
    if any(not isinstance(name, str) or "/" in name for name in names):
        raise ConfigError(f"{index} names files outside its directory")
    return [root / name for name in sorted(names)]
