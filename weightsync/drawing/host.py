"""Draws and parcels in host memory: numpy copies between views of addresses."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.boxes import Ints
    from weightsync.plan.delivery import Staged
    from weightsync.plan.draws import Draw

__all__ = ["HostCopies", "HostStaged"]

_INTEGERS = (1, 2, 4, 8)  # bytes that numpy's integers have


class HostCopies:
    """The copies of one layout's draws."""

    def __init__(self, several: Sequence[Draw]) -> None:
        self._draws = several

    def run(self, targets: Sequence[int], parts: Sequence[Ints], *, deadline: float) -> None:
        """Copy. `targets` are addresses; `parts` are each rank's addresses. `deadline` cannot cut the copying short."""
        for draw in self._draws:
            source = int(parts[draw.rank][draw.part]) + draw.source, draw.source_strides
            target = targets[draw.target] + draw.at, draw.strides
            _copy_box(draw.shape, draw.itemsize, source, target)

    def settle(self, *, deadline: float) -> None:
        """Do nothing: no work is under way between calls."""


class HostStaged:
    """Copies each parcel (`weightsync/plan/delivery.py`) into a staging buffer if `packing`, else out of it."""

    def __init__(self, parcels: Sequence[Sequence[Staged]], *, packing: bool) -> None:
        self._parcels, self._packing = parcels, packing

    def run(self, parcel: int, bases: Ints, buffer: int) -> None:
        """Copy one parcel. Its boxes lie relative to `bases`; `buffer` is the address of its staging buffer."""
        for one in self._parcels[parcel]:
            there = int(bases[one.base]) + one.at, one.strides
            here = buffer + one.begin, one.packed
            source, target = (there, here) if self._packing else (here, there)
            _copy_box(one.shape, one.itemsize, source, target)


def _copy_box(
    shape: tuple[int, ...], itemsize: int, source: tuple[int, tuple[int, ...]], target: tuple[int, tuple[int, ...]]
) -> None:
    """Copy a box. `source` and `target` are each an address, and strides in bytes."""
    np.copyto(_view(target[0], shape, target[1], itemsize), _view(source[0], shape, source[1], itemsize))


def _view(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> np.ndarray[Any, np.dtype[Any]]:
    span = itemsize + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    memory = memoryview((ctypes.c_ubyte * span).from_address(address))
    kind = np.dtype(f"u{itemsize}" if itemsize in _INTEGERS else f"V{itemsize}")  # numpy lacks types that torch has
    return np.ndarray(shape or (1,), kind, memory, 0, strides or (itemsize,))
