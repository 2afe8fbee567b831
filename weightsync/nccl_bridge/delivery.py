"""How a bridge sends or receives the parcels of a delivery, staged in its slots."""

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

_ROOT = 0  # in every communicator, the bridge of the home node


class Load(NamedTuple):
    """One end's parcels, the copies that pack or unpack them, and the slots to stage them in."""

    sizes: Sequence[int]  # bytes of each parcel
    most: int  # bytes that a parcel may have
    copies: HostStaged | DeviceStaged
    bases: Ints  # addresses that the copies count from
    slots: Sequence[int]  # nothing else uses them
    seal: int  # token, mixed with a digest of the parcels: the same at all ends
    packing: bool  # whether this is the sending end


class Way(Protocol):
    """How parcels are staged and sent: in host memory (`HostWay`) or on a GPU (`DeviceWay`)."""

    def staged(
        self, parcels: Sequence[Sequence[Staged]], *, packing: bool, check: Callable[[], object]
    ) -> HostStaged | DeviceStaged:
        """Make the copies of all parcels ready to run. `check`, called now and then, raises to give up."""

    def run(self, communicator: Any, load: Load, *, deadline: float) -> None:
        """Send or receive all parcels. Nothing is read or written any more when it returns or raises."""


class HostWay:
    """Parcels one after the other, staged in one slot in host memory."""

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
    """Raise `TransportBroken` if the sending end is in another delivery, or has other parcels."""
    theirs = np.array([seal], dtype=np.uint64)
    communicator.broadcast(theirs.view(np.uint8).data, _ROOT, deadline=deadline)
    if int(theirs[0]) != seal:
        raise TransportBroken("the other end is in another delivery, or takes this one for something else")


class DeviceWay:
    """Parcels staged in all idle slots on a GPU, so that packing, the wire and unpacking overlap."""

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
