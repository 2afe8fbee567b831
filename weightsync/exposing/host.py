"""Exposes weights in host memory: copies them into a file without a name, which other processes open through this one.

Other processes cannot map a tensor's own memory. The file vanishes with this process, however that ends.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from weightsync.errors import ConfigError
from weightsync.fingerprint import fingerprint
from weightsync.ipc.memfile import ALIGN, MemoryFile, aligned
from weightsync.plan.boxes import packed_strides
from weightsync.plan.exposure import Exposure, Part
from weightsync.processes import started

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from weightsync.filling.program import Program, Write
    from weightsync.sources.base import Source

__all__ = ["HostExposed", "HostExposing"]

_MASK = 2**64 - 1


class HostExposed:
    """The memory that one rank exposes in pushes of one plan."""

    def __init__(self, program: Program) -> None:
        """Raises `ConfigError` if host memory has no room."""
        self.program = program
        self.starts: list[list[int]] = []
        parts, end = [], 0
        for writes in program.writes:
            self.starts.append([])
            for write in writes:
                self.starts[-1].append(end)
                strides = packed_strides(write.shape, write.itemsize)
                parts.append(Part(write.tensor, write.global_offset, write.shape, 0, end, strides))
                end += aligned(write.nbytes)
        nbytes = max(end, ALIGN)
        try:
            self._file = MemoryFile(nbytes)
        except OSError as error:
            raise ConfigError(
                f"the copy of its weights that engines read needs {nbytes} bytes of host memory: {error.strerror}",
                hint="push with in_place=False",
            ) from error
        self.memory = torch.frombuffer(self._file.memory, dtype=torch.uint8)
        pid = os.getpid()
        self.exposure = Exposure.of(pid, started(pid), [self._file.region] if parts else [], parts, program.width)

    def close(self) -> None:
        """Free the memory. Processes that have it mapped keep it until they are told of other memory."""
        self._file.close()


class HostExposing:
    """The exposing of one push: each `advance` copies the parts of one bucket."""

    def __init__(self, source: Source, exposed: HostExposed) -> None:
        self.exposure = exposed.exposure
        self._source, self._exposed = source, exposed
        self._sums: dict[int, int] = {}
        self._next = 0

    @property
    def ready(self) -> bool:
        """See `Exposing`."""
        return self._next == len(self._exposed.program.writes)

    @property
    def measured(self) -> dict[int, int] | None:
        """See `Exposing`."""
        return self._sums if self.ready else None

    def advance(self) -> None:
        """See `Exposing`."""
        if self.ready:
            return
        writes: Sequence[Write] = self._exposed.program.writes[self._next]
        for write, start in zip(writes, self._exposed.starts[self._next], strict=True):
            out = self._exposed.memory[start : start + write.nbytes]
            self._source.read_into(write.shard, write.src_offset, write.shape, out.view(write.dtype).view(write.shape))
            data: np.ndarray[tuple[int], np.dtype[np.uint8]] = out.numpy()
            part = fingerprint(
                data,
                itemsize=write.itemsize,
                global_shape=write.global_shape,
                offset=write.global_offset,
                shape=write.shape,
            )
            self._sums[write.tensor] = (self._sums.get(write.tensor, 0) + part) & _MASK
        self._next += 1

    def close(self, *, deadline: float) -> None:
        """Do nothing: no work is under way between calls."""
