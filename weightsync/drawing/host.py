"""Draws in host memory: numpy copies between views of addresses."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.boxes import Ints
    from weightsync.plan.draws import Draw

__all__ = ["HostCopies"]

_INTEGERS = (1, 2, 4, 8)  # bytes of those that numpy has


class HostCopies:
    """Of one layout."""

    def __init__(self, several: Sequence[Draw]) -> None:
        self._draws = several

    def run(self, targets: Sequence[int], parts: Sequence[Ints], *, deadline: float) -> None:
        """Copy, from and to the memory at these addresses; `parts` by rank. What it takes cannot be cut short."""
        for draw in self._draws:
            begin = int(parts[draw.rank][draw.part]) + draw.source
            source = _view(begin, draw.shape, draw.source_strides, draw.itemsize)
            target = _view(targets[draw.target] + draw.at, draw.shape, draw.strides, draw.itemsize)
            np.copyto(target, source)

    def settle(self, *, deadline: float) -> None:
        """Nothing is under way between calls."""


def _view(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> np.ndarray[Any, np.dtype[Any]]:
    span = itemsize + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    memory = memoryview((ctypes.c_ubyte * span).from_address(address))
    kind = np.dtype(f"u{itemsize}" if itemsize in _INTEGERS else f"V{itemsize}")  # numpy lacks types that torch has
    return np.ndarray(shape or (1,), kind, memory, 0, strides or (itemsize,))
