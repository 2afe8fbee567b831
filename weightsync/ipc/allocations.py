"""Finds the GPU allocation that an address belongs to. A handle shares a whole allocation, as the driver knows it.

Calls the driver's own functions (cuMemGetAddressRange, cuPointerGetAttribute with CU_POINTER_ATTRIBUTE_BUFFER_ID)
through ctypes, because neither torch nor cupy has them. A context of the GPU must be current.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weightsync.errors import TransportBroken
from weightsync.ipc.cuda import cupy
from weightsync.plan.exposure import Region

if TYPE_CHECKING:
    from weightsync.plan.boxes import Ints

__all__ = ["Allocation", "Located", "allocations", "located", "range_of", "serial_of", "shown"]

_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID: unique in the process, never reused
_HINT = (
    "memory of torch's expandable segments or of a pool cannot be shared so: run its process without "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or push with in_place=False"
)


class Allocation(NamedTuple):
    """One allocation by `cudaMalloc`."""

    address: int
    nbytes: int
    serial: int


class Located(NamedTuple):
    """Addresses on one GPU, expressed as bytes of regions that other processes can map."""

    allocations: list[Allocation]
    regions: tuple[Region, ...]  # one for each allocation
    region: Ints  # for each address, the index of its region
    at: Ints  # for each address, its byte in that region

    @property
    def current(self) -> bool:
        """Whether all of these allocations still exist."""
        return all(serial_of(one.address) == one.serial for one in self.allocations)


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportBroken(f"the CUDA driver's library cannot be loaded: {error}") from error


def allocations(pointers: list[int]) -> list[Allocation]:
    """Return the allocations that hold these addresses, sorted by address, each once. Raises `TransportBroken`."""
    found: list[Allocation] = []
    for pointer in sorted(pointers):
        if found and pointer < found[-1].address + found[-1].nbytes:
            continue
        base, nbytes = range_of(pointer)
        found.append(Allocation(base, nbytes, serial_of(base)))
    return found


def range_of(address: int) -> tuple[int, int]:
    """Return the first address and the size of the allocation, made or mapped here, that holds `address`.

    Raises `TransportBroken`.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    status = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    if status:
        raise TransportBroken(f"the CUDA driver knows no allocation at {address:#x} (error {status})", hint=_HINT)
    return base.value, size.value


def serial_of(address: int) -> int:
    """Return the serial number of the allocation that is at `address` now; 0 if there is none."""
    serial = ctypes.c_uint64()
    status = _driver().cuPointerGetAttribute(ctypes.byref(serial), _BUFFER_ID, ctypes.c_uint64(address))
    return int(serial.value) if not status else 0


def shown(allocation: Allocation, gpu: str) -> Region:
    """Return an allocation of the GPU with this UUID as a region that others can map. Raises `TransportBroken`."""
    runtime = cupy().cuda.runtime
    try:
        handle = bytes(runtime.ipcGetMemHandle(allocation.address))
    except runtime.CUDARuntimeError as error:
        raise TransportBroken(
            f"an allocation of {allocation.nbytes} bytes on GPU {gpu} cannot be shared: {error}", hint=_HINT
        ) from error
    return Region(nbytes=allocation.nbytes, gpu=gpu, handle=handle, serial=allocation.serial)


def located(addresses: Ints, gpu: str) -> Located:
    """Locate `addresses` on the GPU with this UUID. Raises `TransportBroken` for memory that cannot be shared."""
    found = allocations(addresses.tolist())
    firsts = np.array([one.address for one in found], dtype=np.int64)
    region = np.searchsorted(firsts, addresses, side="right") - 1
    return Located(found, tuple(shown(one, gpu) for one in found), region, addresses - firsts[region])
