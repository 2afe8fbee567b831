"""Maps memory that another process shows: allocations of GPUs, or files without a name.

A trainer's ranks show where their weights lie, for engines' workers to read. An engine's workers show where they have
places, for bridges to write.

Regions stay mapped until others are asked for, or until the process that exposed them has ended. If a process has ended
or freed its memory, no other process can have that memory while it is mapped here.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from weightsync.errors import TransportBroken
from weightsync.ipc.allocations import range_of
from weightsync.ipc.cuda import SHARING, cupy
from weightsync.ipc.gone import Lookout
from weightsync.processes import started

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from weightsync.plan.boxes import Ints
    from weightsync.plan.exposure import Exposure, Region

__all__ = ["RegionMap"]


class _Mapped(NamedTuple):
    address: int
    memory: Any  # an array over a file, which keeps it mapped; None on a GPU


_Process = tuple[int, str]  # its id, and when it began


class _Asked(NamedTuple):
    exposures: Sequence[Exposure]
    addresses: list[Ints]  # of the regions of each


class RegionMap:
    """The regions that this process maps. It works on its GPU `device`, or in host memory if that is None."""

    def __init__(self, device: int | None, *, writable: bool = False) -> None:
        """`writable`: the regions are an engine's places, not a trainer's weights. GPU memory is always writable."""
        self._device = device
        self._writable = writable
        self._whose = "an engine's worker" if writable else "a trainer's rank"
        self._open: dict[_Process, dict[Region, _Mapped]] = {}
        self._asked: _Asked | None = None  # the last request, all of it mapped; kept, as its regions may be many
        self._lock = threading.RLock()
        self.held = False  # if set, the lookout unmaps nothing: a copy that is late may still read
        self._lookout = Lookout(self._look, device)

    @contextmanager
    def mapped(self, exposures: Sequence[Exposure]) -> Iterator[list[Ints]]:
        """Map the regions of these exposures. Yields the addresses where each one's regions begin, int64 [regions].

        Nothing is unmapped inside the `with`, and all reads and writes must have ended when it ends. Asking for the
        same sequence again costs next to nothing. Raises `TransportBroken`.
        """
        with self._lock:
            for one in exposures:
                if started(one.pid) != one.started:
                    raise TransportBroken(
                        f"{self._whose} that showed its memory (process {one.pid}) is not there",
                        hint="processes of a node have to see one another (containers: --pid=host); "
                        "else push with in_place=False",
                    )
            if self._asked is None or self._asked.exposures is not exposures:
                self._asked = _Asked(exposures, self._map(exposures))
            self._lookout.start()
            yield self._asked.addresses

    def release(self) -> None:
        """Unmap everything. `mapped` maps it again when asked."""
        with self._lock:
            for process in list(self._open):
                self._close(process)

    def _look(self) -> bool:
        """Unmap memory of processes that have ended. Returns whether any memory is still mapped."""
        if not self._lock.acquire(blocking=False):
            return True  # the memory is in use
        try:
            for process in [(pid, since) for pid, since in self._open if started(pid) != since and not self.held]:
                self._close(process)
            return bool(self._open)
        finally:
            self._lock.release()

    def _map(self, exposures: Sequence[Exposure]) -> list[Ints]:
        wanted: dict[_Process, set[Region]] = {}
        for one in exposures:
            wanted.setdefault((one.pid, one.started), set()).update(one.regions)
        for process in list(self._open):
            self._close(process, but=wanted.get(process, set()))
        found = []
        for one in exposures:
            mapped = self._open.setdefault((one.pid, one.started), {})
            for region in one.regions:
                if region not in mapped:
                    mapped[region] = self._open_gpu(region) if region.gpu else self._open_file(one.pid, region)
            addresses = np.array([mapped[region].address for region in one.regions], dtype=np.uint64)
            found.append(addresses.view(np.int64))
        return found

    def _open_gpu(self, region: Region) -> _Mapped:
        if self._device is None:
            raise TransportBroken(f"{self._whose} showed memory of GPU {region.gpu} to a process without a GPU")
        runtime = cupy().cuda.runtime
        try:
            with cupy().cuda.Device(self._device):
                address = int(runtime.ipcOpenMemHandle(region.handle))
                try:
                    if range_of(address)[1] < region.nbytes:
                        raise TransportBroken(f"an allocation of GPU {region.gpu} is smaller than it was shown as")
                except TransportBroken:
                    runtime.ipcCloseMemHandle(address)
                    raise
                return _Mapped(address, None)
        except runtime.CUDARuntimeError as error:
            raise TransportBroken(
                f"process {os.getpid()} cannot map what {self._whose} showed of GPU {region.gpu} on its own GPU "
                f"{self._device}: {error}",
                hint=SHARING,
            ) from error

    def _open_file(self, pid: int, region: Region) -> _Mapped:
        if self._device is not None:
            raise TransportBroken(f"{self._whose} showed host memory to a process on GPU {self._device}")
        path = f"/proc/{pid}/fd/{region.fd}"
        try:
            if os.readlink(path) != f"/memfd:{region.name} (deleted)":
                raise TransportBroken(f"{path} is not the memory that process {pid} showed")
            fd = os.open(path, (os.O_RDWR if self._writable else os.O_RDONLY) | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK  # else a read may end in a SIGBUS
                if status.st_uid != os.geteuid() or status.st_size < region.nbytes or not sealed:
                    raise TransportBroken(
                        f"what process {pid} showed has another size, may change it, or belongs to another user"
                    )
                access = mmap.PROT_READ | (mmap.PROT_WRITE if self._writable else 0)
                memory = np.frombuffer(mmap.mmap(fd, region.nbytes, prot=access), dtype=np.uint8)
            finally:
                os.close(fd)
        except OSError as error:
            raise TransportBroken(
                f"what {self._whose} showed (process {pid}) cannot be mapped: {error.strerror}",
                hint="processes of a node have to see one another (containers: --pid=host); "
                "else push with in_place=False",
            ) from error
        return _Mapped(int(memory.ctypes.data), memory)

    def _close(self, process: _Process, but: AbstractSet[Region] = frozenset()) -> None:
        """Unmap the regions that a process has shown, except those in `but`."""
        self._asked = None
        mapped = self._open[process]
        for region in [region for region in mapped if region not in but]:
            address, memory = mapped.pop(region)
            if memory is None:
                with cupy().cuda.Device(self._device):
                    cupy().cuda.runtime.ipcCloseMemHandle(address)
        if not mapped:
            del self._open[process]
