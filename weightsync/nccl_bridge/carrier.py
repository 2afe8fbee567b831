"""A bridge's part in deliveries.

Weights go from the memory that trainer ranks expose on one node, through the bridges' communicator, straight into the
places that engines show on other nodes.

Every bridge prepares a delivery before anything is sent: it works out the parcels and the copies that fill or empty
each, and maps the memory. That takes seconds the first time, and next to nothing as long as the layout stays. Then the
sending bridge packs a parcel while the previous one is on the wire, and the others unpack one while the next arrives.
The only check here is that all bridges are in the same delivery of the same parcels. The bytes are compared afterwards,
tensor by tensor, in the engines.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.ipc.regions import RegionMap
from weightsync.nccl_bridge.delivery import DeviceWay, HostWay, Load, Way
from weightsync.nccl_bridge.replies import NEVER
from weightsync.plan.delivery import boxes_of, incoming, outgoing, parcels_of, share_of
from weightsync.plan.exposure import Exposure
from weightsync.plan.packing import digest_of
from weightsync.plan.replay_facts import LAYOUTS
from weightsync.plan.told import SeenExposures, SeenManifests
from weightsync.transports.base import seconds_left

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from weightsync.drawing.device import DeviceStaged
    from weightsync.drawing.host import HostStaged
    from weightsync.errors import WeightSyncError
    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.nccl_bridge.commands import Prepare
    from weightsync.nccl_bridge.gloo import GlooCommunicator
    from weightsync.nccl_bridge.nccl import NcclCommunicator
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["Carrier"]

_NONE = -1  # in place of a token: no delivery

T = TypeVar("T")


class _Plan(NamedTuple):
    """The parcels of one layout and the copies that fill or empty them; reused until the layout changes."""

    sizes: Sequence[int]
    copies: HostStaged | DeviceStaged


class _Prepared(NamedTuple):
    """A delivery that this bridge is ready for."""

    token: int
    seal: int  # token, mixed with a digest of the parcels: the same at all ends
    plan: _Plan
    most: int  # bytes that a parcel may have
    shown: tuple[Exposure, ...]  # memory that the sending end reads, or that a receiving end writes
    packing: bool  # whether this is the sending end


class Carrier:
    """One bridge's part in deliveries. Keeps the plans of the last layouts; memory stays mapped until `release`."""

    def __init__(self, arena: Arena, slots: DeviceSlots | None) -> None:
        gpu = slots.device if slots is not None else None
        self._way: Way = HostWay(arena) if slots is None else DeviceWay(slots, arena.slot_bytes)
        self._slot_bytes = arena.slot_bytes
        self._sources, self._targets = RegionMap(gpu), RegionMap(gpu, writable=True)
        self._manifests = SeenManifests(LAYOUTS)
        self._exposures, self._places = SeenExposures(LAYOUTS), SeenExposures(LAYOUTS)
        self._read: dict[Hashable, tuple[Exposure, ...]] = {}  # latest last
        self._plans: dict[Hashable, _Plan] = {}  # latest last
        self._prepared: _Prepared | None = None
        self._wanted = _NONE  # token of the delivery that the daemon asked for last
        self._busy = threading.Lock()

    def prepare(self, command: Prepare, *, deadline: float) -> None:
        """Get ready for the command's delivery; a delivery prepared before is dropped.

        Raises `TransportError`, or `LocalProtocolError` if the weights cannot be delivered. The error's phase is
        `NEVER` if another attempt would fail in the same way.
        """
        self._wanted = command.token

        def check() -> None:
            seconds_left(deadline, "preparing a delivery")
            if self._wanted not in (command.token, _NONE):
                raise TransportClosed("another delivery is prepared instead")

        if command.parcel > self._slot_bytes or command.turn >= command.turns:
            raise LocalProtocolError(
                f"parcels of {command.parcel} bytes, turn {command.turn} of {command.turns}: slots have "
                f"{self._slot_bytes} bytes, and turns count from 0"
            )
        with self._alone(deadline, "preparing a delivery"):
            check()
            self._prepared = None
            prepared = self._worked_out(command, check)
            check()
            if self._wanted == _NONE:  # `release` was called meanwhile; the plan is kept, but nothing is mapped
                raise TransportClosed("nobody waits for this delivery any more")
            with _for_good(TransportBroken), self._regions(prepared).mapped(prepared.shown):
                self._prepared = prepared

    def _worked_out(self, command: Prepare, check: Callable[[], None]) -> _Prepared:
        manifest = self._manifests.of(command.manifest)
        tensors, packing = manifest.tensors, command.exposures is not None
        places: tuple[Exposure, ...] = ()
        if command.places is not None:
            places = self._unpacked(self._places.of(command.places), manifest)
        shown = places
        if command.exposures is not None:
            shown = self._unpacked(self._exposures.of(command.exposures), manifest)
        turns = {"turn": command.turn, "turns": command.turns}
        asked = () if command.whole else tuple(one.parts_digest for one in places)
        parcels = manifest.digest, command.parcel, *turns.values(), command.whole, asked
        # The sending end's key leaves out where the trainer's parts lie: that changes from push to push, so `run` looks
        # it up each time.
        mine = tuple(one.shapes_digest if packing else (one.parts_digest, len(one.regions)) for one in shown)

        def work_out() -> _Plan:
            boxes = share_of(tensors, **turns) if command.whole else boxes_of(places, tensors, **turns)
            found = parcels_of(boxes, tensors, command.parcel, check=check)
            with _for_good(LocalProtocolError):
                copies = (outgoing if packing else incoming)(found, shown, tensors, check)
            staged = self._way.staged(copies, packing=packing, check=check)
            return _Plan([parcel.nbytes for parcel in found], staged)

        plan = _kept(self._plans, (parcels, mine, packing), work_out)
        seal = command.token ^ int.from_bytes(digest_of(repr(parcels).encode())[:7], "little")
        return _Prepared(command.token, seal, plan, command.parcel, shown, packing)

    def run(
        self,
        communicator: GlooCommunicator | NcclCommunicator,
        token: int,
        slots: Sequence[int],
        *,
        packing: bool,
        deadline: float,
    ) -> None:
        """Send or receive the delivery that was prepared under `token`. Nothing else may use `slots` meanwhile.

        Raises `TransportError`; nothing of the delivery is under way any more then.
        """
        with self._alone(deadline, "a delivery"):
            ours, self._prepared = self._prepared, None
            if ours is None or (ours.token, ours.packing) != (token, packing):
                raise LocalProtocolError("this delivery was not prepared here")
            with self._regions(ours).mapped(ours.shown) as begins:
                if packing:
                    bases = np.concatenate(
                        [one.addresses(begin) for one, begin in zip(ours.shown, begins, strict=True)]
                    )
                else:
                    bases = np.concatenate(begins)
                load = Load(ours.plan.sizes, ours.most, ours.plan.copies, bases, slots, ours.seal, packing)
                self._way.run(communicator, load, deadline=deadline)

    def release(self) -> None:
        """Unmap all memory, because weights no longer travel as deliveries and its owners want it back.

        Memory of a delivery under way stays mapped. A delivery that is being prepared ends without mapping any.
        """
        self._wanted = _NONE
        if self._busy.acquire(blocking=False):
            try:
                self._prepared = None
                self._sources.release()
                self._targets.release()
            finally:
                self._busy.release()

    def _regions(self, prepared: _Prepared) -> RegionMap:
        return self._sources if prepared.packing else self._targets

    def _unpacked(self, told: Exposures, manifest: Manifest) -> tuple[Exposure, ...]:
        """The exposures of all ranks: the same objects each time, because `RegionMap` finds mapped memory by them."""
        return _kept(
            self._read,
            (told.digest, manifest.digest),
            lambda: tuple(Exposure.unpack(rank, manifest.tensors) for rank in told.ranks),
        )

    @contextmanager
    def _alone(self, deadline: float, what: str) -> Iterator[None]:
        if not self._busy.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TransportTimeout(f"{what}: another one was under way until the deadline")
        try:
            yield
        finally:
            self._busy.release()


@contextmanager
def _for_good(kind: type[WeightSyncError]) -> Iterator[None]:
    """Give errors of `kind` the phase `NEVER`: another attempt would fail in the same way."""
    try:
        yield
    except kind as error:
        error.phase = NEVER
        raise


def _kept(kept: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """Return `kept`'s entry for `key`, made if it is missing. Keeps two entries a layout: places and exposures."""
    found = kept.pop(key) if key in kept else make()
    kept[key] = found
    for old in list(kept)[: -2 * LAYOUTS]:
        del kept[old]
    return found
