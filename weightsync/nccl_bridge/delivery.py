"""How parcels of a delivery travel, at either end: out of this bridge's staging memory or into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from weightsync.drawing.host import HostStaged
from weightsync.errors import TransportBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.drawing.device import DeviceStaged
    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.nccl_bridge.gloo import GlooCommunicator
    from weightsync.plan.boxes import Ints
    from weightsync.plan.delivery import Staged

__all__ = ["DeviceWay", "HostWay", "Load", "Way"]

_ROOT = 0  # of every communicator: the bridge of the node that coordinates


class Load(NamedTuple):
    """What one end packs, or takes out, and where it may be staged."""

    sizes: Sequence[int]  # bytes of the parcels
    most: int  # bytes that each has at most
    copies: HostStaged | DeviceStaged
    bases: Ints
    slots: Sequence[int]  # that nothing else uses
    seal: int  # which delivery it is, and of which parcels
    packing: bool


class Way(Protocol):
    """In host memory, or on a GPU."""

    def staged(
        self, parcels: Sequence[Sequence[Staged]], *, packing: bool, check: Callable[[], object]
    ) -> HostStaged | DeviceStaged:
        """Copies, worked out once; `check` is called now and then and raises when there is no point in going on."""

    def run(self, communicator: Any, load: Load, *, deadline: float) -> None:
        """Send all parcels, or take them. Nothing is read or written any more when it returns or raises."""


class HostWay:
    """One parcel after the other, in one slot."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def staged(self, parcels: Sequence[Sequence[Staged]], *, packing: bool, check: Callable[[], object]) -> HostStaged:
        return HostStaged(parcels, packing=packing)

    def run(self, communicator: Any, load: Load, *, deadline: float) -> None:
        assert isinstance(load.copies, HostStaged), "slots are in host memory"
        _check_seal(communicator, load.seal, deadline)
        memory = np.frombuffer(self._arena.slot(load.slots[0]), dtype=np.uint8)
        address = int(memory.ctypes.data)
        for number, nbytes in enumerate(load.sizes):
            if load.packing:
                load.copies.run(number, load.bases, address)
            communicator.broadcast(memory[:nbytes].data, _ROOT, deadline=deadline)
            if not load.packing:
                load.copies.run(number, load.bases, address)


def _check_seal(communicator: GlooCommunicator, seal: int, deadline: float) -> None:
    """Raise `TransportBroken` where the sending end is in another delivery."""
    theirs = np.array([seal], dtype=np.uint64)
    communicator.broadcast(theirs.view(np.uint8).data, _ROOT, deadline=deadline)
    if int(theirs[0]) != seal:
        raise TransportBroken("the other end is in another delivery, or takes this one for something else")


class DeviceWay:
    """Packing, the wire and unpacking at the same time, in all slots."""

    def __init__(self, slots: DeviceSlots, slot_bytes: int) -> None:
        self._slots, self._slot_bytes = slots, slot_bytes

    def staged(
        self, parcels: Sequence[Sequence[Staged]], *, packing: bool, check: Callable[[], object]
    ) -> DeviceStaged:
        from weightsync.drawing.conveyor import device_staged

        return device_staged(self._slots.device, parcels, packing=packing, check=check)

    def run(self, communicator: Any, load: Load, *, deadline: float) -> None:
        from weightsync.drawing.conveyor import Conveyor

        assert not isinstance(load.copies, HostStaged), "slots are on a GPU"
        buffers = [
            self._slots.slot(slot) + first
            for slot in load.slots
            for first in range(0, self._slot_bytes - load.most + 1, load.most)
        ]
        conveyor = Conveyor(self._slots.device, load.copies, load.bases, buffers, packing=load.packing)
        try:
            communicator.stream(
                [(conveyor.buffer(number), nbytes) for number, nbytes in enumerate(load.sizes)],
                load.seal,
                _ROOT,
                before=conveyor.before,
                after=conveyor.after,
                settled=conveyor.settled,
                deadline=deadline,
            )
        except BaseException:
            conveyor.settle()
            raise
