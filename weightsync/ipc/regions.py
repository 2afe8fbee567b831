"""Memory that a trainer rank exposes, as an engine's worker maps it: allocations of GPUs, or files without a name.

What was mapped stays so until other regions are asked for, or until the process that exposed it has ended: whoever maps
memory of a process that is gone, or that has freed it, keeps it from everybody else.
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
    memory: Any  # what holds it: an array over a file; None on a GPU


_Process = tuple[int, str]  # its id, and when it began


class _Asked(NamedTuple):
    exposures: Sequence[Exposure]
    addresses: list[Ints]  # of the regions of each


class RegionMap:
    """Of one worker, whose weights lie on its GPU `device`, or in host memory if that is None."""

    def __init__(self, device: int | None) -> None:
        self._device = device
        self._open: dict[_Process, dict[Region, _Mapped]] = {}
        self._asked: _Asked | None = None  # last, and all of it is mapped: there may be tens of thousands
        self._lock = threading.RLock()
        self.held = False  # nothing is unmapped: what was to be read by now may still be
        self._lookout = Lookout(self._look, device)

    @contextmanager
    def mapped(self, exposures: Sequence[Exposure]) -> Iterator[list[Ints]]:
        """Where the regions of each of these ranks begin in this process, int64 [regions]. Inside, nothing is unmapped;
        what is read must have been read at its end. The same sequence again costs next to nothing. Raises
        `TransportBroken`.
        """
        with self._lock:
            for one in exposures:
                if started(one.pid) != one.started:
                    raise TransportBroken(
                        f"the trainer rank that exposed its weights (process {one.pid}) is not there",
                        hint="engine and trainer have to see one another's processes (containers: --pid=host); "
                        "else push with in_place=False",
                    )
            if self._asked is None or self._asked.exposures is not exposures:
                self._asked = _Asked(exposures, self._map(exposures))
            self._lookout.start()
            yield self._asked.addresses

    def release(self) -> None:
        """Unmap everything; it is mapped again when it is asked for."""
        with self._lock:
            for process in list(self._open):
                self._close(process)

    def _look(self) -> bool:
        """Let go of what processes that have ended had exposed; whether there is more to look after."""
        if not self._lock.acquire(blocking=False):
            return True  # it is being read
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
            raise TransportBroken(f"the trainer exposed weights on GPU {region.gpu} to a worker without a GPU")
        runtime = cupy().cuda.runtime
        try:
            with cupy().cuda.Device(self._device):
                address = int(runtime.ipcOpenMemHandle(region.handle))
                try:
                    if range_of(address)[1] < region.nbytes:
                        raise TransportBroken(f"an allocation of GPU {region.gpu} is smaller than it was exposed as")
                except TransportBroken:
                    runtime.ipcCloseMemHandle(address)
                    raise
                return _Mapped(address, None)
        except runtime.CUDARuntimeError as error:
            raise TransportBroken(
                f"process {os.getpid()} cannot map a trainer's memory of GPU {region.gpu} on its own GPU "
                f"{self._device}: {error}",
                hint=SHARING,
            ) from error

    def _open_file(self, pid: int, region: Region) -> _Mapped:
        if self._device is not None:
            raise TransportBroken(f"the trainer exposed weights in host memory to a worker on GPU {self._device}")
        path = f"/proc/{pid}/fd/{region.fd}"
        try:
            if os.readlink(path) != f"/memfd:{region.name} (deleted)":
                raise TransportBroken(f"{path} is not the memory that process {pid} exposed")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK  # else a read may end in a SIGBUS
                if status.st_uid != os.geteuid() or status.st_size < region.nbytes or not sealed:
                    raise TransportBroken(
                        f"what process {pid} exposed has another size, may change it, or belongs to another user"
                    )
                memory = np.frombuffer(mmap.mmap(fd, region.nbytes, prot=mmap.PROT_READ), dtype=np.uint8)
            finally:
                os.close(fd)
        except OSError as error:
            raise TransportBroken(
                f"what process {pid} exposed cannot be mapped: {error.strerror}",
                hint="engine and trainer have to see one another's processes; else push with in_place=False",
            ) from error
        return _Mapped(int(memory.ctypes.data), memory)

    def _close(self, process: _Process, but: AbstractSet[Region] = frozenset()) -> None:
        """Let go of what a process had exposed, `but` for these."""
        self._asked = None
        mapped = self._open[process]
        for region in [region for region in mapped if region not in but]:
            address, memory = mapped.pop(region)
            if memory is None:
                with cupy().cuda.Device(self._device):
                    cupy().cuda.runtime.ipcCloseMemHandle(address)
        if not mapped:
            del self._open[process]
