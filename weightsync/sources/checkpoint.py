"""A Hugging Face checkpoint on disk, read box by box as slots need it: memory does not grow with the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from weightsync.errors import SourceError
from weightsync.plan.boxes import box_runs
from weightsync.plan.manifest import Layout, Shard
from weightsync.sources.safetensors_header import StoredTensor, files_of, read_header

if TYPE_CHECKING:
    from types import TracebackType

    import numpy.typing as npt

__all__ = ["CheckpointSource"]

_SCRATCH = 1 << 22  # bytes read at a time, if they cannot be read straight into their place
_DIRECT = 1 << 16  # bytes: if runs start at least this far apart on average, each gets a system call of its own


class CheckpointSource:
    """All tensors of a safetensors checkpoint: those of `model.safetensors`, or those that the index lists.

    `path` is the directory, or a single `.safetensors` file. Files are opened and their headers checked at once, so
    that a damaged checkpoint is refused before anything is sent. Tensors that `model.safetensors.index.json` does not
    list are left out. Close the source, or use it as a context manager.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `SourceError` naming file and tensor if the checkpoint is incomplete."""
        self._files: list[int] = []  # descriptors
        self._paths: list[Path] = []
        self._stored: list[tuple[int, StoredTensor]] = []  # by shard: its file, and its place there
        try:
            self._layout = self._open(Path(path))
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> Layout:
        shards = []
        for file, wanted in files_of(path):
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise SourceError(f"cannot open {file}: {error.strerror}") from error
            self._files.append(descriptor)
            self._paths.append(file)
            stored = read_header(descriptor, file)
            for name in stored if wanted is None else wanted:
                tensor = stored.get(name)
                if tensor is None:
                    raise SourceError(f"{file} does not have tensor {name!r}, which its index says it has")
                shards.append(Shard(name, tensor.dtype.name, tensor.shape, (0,) * len(tensor.shape), tensor.shape))
                self._stored.append((len(self._files) - 1, tensor))
        return Layout.of(shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; nothing can be read afterwards. Closing twice is fine."""
        while self._files:
            os.close(self._files.pop())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return self._layout.nbytes

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return self._layout.tensors.names

    def layout(self) -> Layout:
        """One shard per tensor: the whole of it."""
        return self._layout

    def local(self, shard: int) -> torch.Tensor | None:
        """None: tensors lie on disk."""
        return None

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """None: bytes are best fingerprinted where `read_into` wrote them."""
        return None

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Read a box of a tensor from disk into `out`, without a copy where `out` is contiguous in host memory."""
        if not self._files:
            raise SourceError("the checkpoint is closed")
        file, stored = self._stored[shard]
        if tuple(out.shape) != shape or str(out.dtype) != f"torch.{stored.dtype.name}":
            raise ValueError(f"a box of {stored.dtype.name} {shape} does not go into {out.dtype} {tuple(out.shape)}")
        self._read(file, stored, src_offset, out)

    def _read(self, file: int, stored: StoredTensor, offset: tuple[int, ...], out: torch.Tensor) -> None:
        nbytes = out.numel() * stored.dtype.itemsize
        if not nbytes:
            return
        if out.is_contiguous() and out.device.type == "cpu":
            shape = tuple(out.shape) or (1,)
            starts, length = box_runs(stored.shape or (1,), offset or (0,), shape, stored.dtype.itemsize)
            self._read_runs(file, stored.begin + starts, length, out.reshape(-1).view(torch.uint8).numpy())
        elif nbytes <= _SCRATCH:
            scratch = torch.empty(out.shape, dtype=out.dtype, device="cpu")
            self._read(file, stored, offset, scratch)
            out.copy_(scratch)
        else:
            dim = next(d for d, length in enumerate(out.shape) if length > 1)
            half = out.shape[dim] // 2
            behind = (*offset[:dim], offset[dim] + half, *offset[dim + 1 :])
            self._read(file, stored, offset, out.narrow(dim, 0, half))
            self._read(file, stored, behind, out.narrow(dim, half, out.shape[dim] - half))

    def _read_runs(self, file: int, starts: npt.NDArray[np.int64], length: int, target: npt.NDArray[np.uint8]) -> None:
        """Read `length` bytes from each of `starts`, ascending, one after the other into `target`."""
        spread = int(starts[-1] - starts[0]) // max(1, len(starts) - 1)  # bytes between one run's start and the next's
        if spread >= _DIRECT or len(starts) == 1:
            for i, start in enumerate(starts.tolist()):
                self._read_bytes(file, start, target[i * length : (i + 1) * length])
            return
        scratch = np.empty(_SCRATCH, dtype=np.uint8)
        done = 0
        while done < len(starts):
            begin = int(starts[done])
            end = int(np.searchsorted(starts, begin + _SCRATCH - length, side="right"))
            span = scratch[: int(starts[end - 1]) + length - begin]
            self._read_bytes(file, begin, span)
            for i, start in enumerate((starts[done:end] - begin).tolist(), start=done):
                target[i * length : (i + 1) * length] = span[start : start + length]
            done = end

    def _read_bytes(self, file: int, begin: int, target: npt.NDArray[np.uint8]) -> None:
        view = target.data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._files[file], [view[done:]], begin + done)
            except OSError as error:
                raise SourceError(f"cannot read {self._paths[file]}: {error.strerror}") from error
            if not got:
                raise SourceError(f"{self._paths[file]} has become shorter: no byte at {begin + done}")
            done += got
