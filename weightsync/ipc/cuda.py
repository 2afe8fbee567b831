"""GPU memory that other processes of this node may map: allocated by a bridge, opened by trainer ranks and readers.

It is plain `cudaMalloc` memory, whose handles every process of the node can open; memory of torch's expandable segments
has none. A process that *reads* (or writes) the memory opens its handle on its own GPU, whichever GPU the memory lies
on: the owner's GPU need not be visible there, and no CUDA context is made on it. A kernel faults if it touches memory
that was opened on another device than its own. Opening costs 0.6 ms on the same GPU and up to 160 ms the first time on
a peer, so each process opens each arena once and keeps it.

Importing this loads no cupy; the first call does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from weightsync.errors import ConfigError, LocalProtocolError, TransportBroken, TransportClosed, install_hint
from weightsync.ipc.arena import DeviceMemory, stride

if TYPE_CHECKING:
    from weightsync.ipc.arena import ArenaOffer

__all__ = ["SHARING", "DeviceSlots", "cupy", "free_bytes", "lock_pages", "unlock_pages"]

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
SHARING = (
    "GPU memory is shared between processes of one PID and one IPC namespace, on GPUs that reach each other: start "
    "containers with --pid=host --ipc=host, and look at nvidia-smi topo -p2p r; weightsync doctor tells which it is"
)


def cupy() -> Any:
    """Import and return cupy. Raises `ConfigError` if it is not installed."""
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(
            f"GPUs are driven through cupy, which this Python does not have ({error})",
            hint=install_hint("cuda13") + ', or ".[cuda12]" for CUDA 12; or set arena.device = "cpu"',
        ) from error
    return cupy


def free_bytes(device: int) -> tuple[int, int]:
    """Return the free and the total bytes of a GPU of this process."""
    c = cupy()
    with c.cuda.Device(device):
        free, total = c.cuda.runtime.memGetInfo()
    return int(free), int(total)


def lock_pages(address: int, nbytes: int, device: int) -> str:
    """Have the driver lock host memory, so that a GPU's copy engine reaches it at the speed of its link.

    Returns "", or why the driver does not lock it. Copies to the memory then work too, only slower.
    """
    runtime = cupy().cuda.runtime
    try:
        with cupy().cuda.Device(device):
            runtime.hostRegister(address, nbytes, 0)
    except runtime.CUDARuntimeError as error:
        return str(error)
    return ""


def unlock_pages(address: int, device: int) -> None:
    """Undo `lock_pages`. No copy to that memory may be under way."""
    runtime = cupy().cuda.runtime
    with cupy().cuda.Device(device):
        runtime.hostUnregister(address)


class DeviceSlots:
    """The slots of one arena in GPU memory, as this process addresses them. Made by `allocate` or `open`."""

    def __init__(self, address: int, memory: DeviceMemory, slots: int, pitch: int, device: int, *, owner: bool) -> None:
        self.memory = memory
        self.device = device  # of this process
        self._address: int | None = address
        self._slots = slots
        self._pitch = pitch
        self._owner = owner

    @classmethod
    def allocate(cls, slots: int, slot_bytes: int, *, gpu: str, device: int) -> Self:
        """Take `slots` × `slot_bytes` (rounded up) on the GPU that is `device` here and `gpu` (UUID) everywhere.

        Raises `ConfigError` if there is no room.
        """
        runtime = cupy().cuda.runtime
        pitch = stride(slot_bytes)
        nbytes = slots * pitch
        try:
            with cupy().cuda.Device(device):
                address = runtime.malloc(nbytes)
                try:
                    handle = runtime.ipcGetMemHandle(address)
                    runtime.memset(address, 0, nbytes)
                    runtime.deviceSynchronize()
                except runtime.CUDARuntimeError:
                    runtime.free(address)
                    raise
        except runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise ConfigError(f"GPU {gpu} gives no memory that can be shared: {error}", hint=SHARING) from error
            free, total = free_bytes(device)
            raise ConfigError(
                f"an arena of {slots} slots of {slot_bytes} bytes needs {nbytes} bytes of GPU {gpu}, which has "
                f"{free} of {total} free",
                hint="make arena.slots or arena.slot_bytes smaller, leave slot_bytes to be chosen, or give engine "
                "and trainer a smaller share of the GPU",
            ) from error
        return cls(address, DeviceMemory(gpu=gpu, handle=bytes(handle)), slots, pitch, device, owner=True)

    @classmethod
    def open(cls, offer: ArenaOffer, device: int) -> Self:
        """Map the slots that `offer` describes for use on this process's GPU `device`. Raises `TransportBroken`."""
        memory = offer.memory
        if memory is None:
            raise LocalProtocolError(f"the slots of arena {offer.name} lie in host memory")
        runtime = cupy().cuda.runtime
        try:
            with cupy().cuda.Device(device):
                address = runtime.ipcOpenMemHandle(memory.handle)
        except runtime.CUDARuntimeError as error:
            raise TransportBroken(
                f"process {os.getpid()} cannot map arena {offer.name} of GPU {memory.gpu} on its own GPU {device}: "
                f"{error}",
                hint=f"its bridge has just ended; or else {SHARING}",
            ) from error
        return cls(address, memory, offer.slots, stride(offer.slot_bytes), device, owner=False)

    def slot(self, index: int) -> int:
        """The address of a slot. Raises `TransportClosed` after `close`."""
        if self._address is None:
            raise TransportClosed(f"the slots of GPU {self.memory.gpu} were closed")
        if not 0 <= index < self._slots:
            raise LocalProtocolError(f"there is no slot {index}, only {self._slots}")
        return self._address + index * self._pitch

    def close(self) -> None:
        """Give the memory back, or detach from it; nothing may be running that uses it. Closing twice does nothing."""
        address, self._address = self._address, None
        if address is None:
            return
        runtime = cupy().cuda.runtime
        with cupy().cuda.Device(self.device):
            if self._owner:
                runtime.free(address)
            else:
                runtime.ipcCloseMemHandle(address)
