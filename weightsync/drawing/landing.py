"""A worker's places in host memory: bridges write into a file without a name, and the worker copies out of it."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import numpy as np

from weightsync.drawing.host import HostCopies
from weightsync.errors import TransportBroken
from weightsync.ipc.memfile import ALIGN, MemoryFile, aligned
from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Draw
from weightsync.plan.exposure import Exposure, Part
from weightsync.processes import started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.draws import Wanted

__all__ = ["Landing"]


class Landing:
    """The landing of `boxes`. It takes as much host memory as they do, because no other process can map parameters.

    Its exposure does not depend on where the parameters lie, so it stays the same when they move.
    """

    def __init__(self, boxes: Sequence[Wanted], width: int) -> None:
        """Raises `TransportBroken` if host memory has no room."""
        parts, copies, end = [], [], 0
        for number, box in enumerate(boxes):
            packed = packed_strides(box.shape, box.itemsize)
            parts.append(Part(box.tensor, box.offset, box.shape, 0, end, packed))
            copy = Draw(0, number, 0, packed, box.target, box.at, box.strides, box.shape, box.itemsize)
            copies.append(copy)
            end += aligned(copy.nbytes)
        nbytes = max(end, ALIGN)
        try:
            self._file = MemoryFile(nbytes)
        except OSError as error:
            raise TransportBroken(
                f"a landing for what is written into this worker needs {nbytes} bytes of host memory: {error.strerror}"
            ) from error
        pid = os.getpid()
        self._exposure = Exposure.of(pid, started(pid), [self._file.region] if parts else [], parts, width)
        memory = np.frombuffer(self._file.memory, dtype=np.uint8)
        begins = np.array([memory.ctypes.data] * bool(parts), dtype=np.uint64).view(np.int64)
        self._memory, self._at = memory, self._exposure.addresses(begins)
        self._copies = HostCopies(copies)

    def show(self, targets: Sequence[int]) -> Exposure:
        """Return the exposure of the landing, for others to write into."""
        return self._exposure

    def land(self, targets: Sequence[int]) -> None:
        """Copy the landing into the parameters; `targets` are their addresses. The copying cannot be cut short."""
        self._copies.run(targets, [self._at], deadline=math.inf)

    def close(self) -> None:
        """Free the memory. Processes that have it mapped keep it until they are told of other places."""
        self._file.close()
