"""Weights from one node straight into engines of others: out of the memory that a trainer exposes there, through the
bridges' communicator, into the places that engines show here.

A delivery is prepared first, at all ends and on no wire: what is in which parcel; the copies that fill or empty each;
the memory, mapped. That takes seconds the first time, and next to nothing as long as the layout stays. The sending
bridge then packs a parcel while the last one is on the wire, and the others take parcels out while the next arrives.
Nothing is checked here but that all are in the same delivery of the same parcels: what lies in engines afterwards is
compared, tensor by tensor.
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

_NONE = -1  # no delivery's token

T = TypeVar("T")


class _Plan(NamedTuple):
    """What was worked out for a layout."""

    sizes: Sequence[int]
    copies: HostStaged | DeviceStaged


class _Prepared(NamedTuple):
    """The delivery that comes next."""

    token: int
    seal: int  # the token, and what the parcels are
    plan: _Plan
    most: int
    shown: tuple[Exposure, ...]  # what is read at the sending end, what is written at the other
    packing: bool


class Carrier:
    """One bridge's part in deliveries. What was worked out is kept, and what is mapped stays so until `release`."""

    def __init__(self, arena: Arena, slots: DeviceSlots | None) -> None:
        gpu = slots.device if slots is not None else None
        self._way: Way = HostWay(arena) if slots is None else DeviceWay(slots, arena.slot_bytes)
        self._slot_bytes = arena.slot_bytes
        self._sources, self._targets = RegionMap(gpu), RegionMap(gpu, writable=True)
        self._manifests = SeenManifests(LAYOUTS)
        self._exposures, self._places = SeenExposures(LAYOUTS), SeenExposures(LAYOUTS)
        self._read: dict[Hashable, tuple[Exposure, ...]] = {}  # the latest last, as plans
        self._plans: dict[Hashable, _Plan] = {}
        self._prepared: _Prepared | None = None
        self._wanted = _NONE  # token of the delivery that was asked for last
        self._busy = threading.Lock()

    def prepare(self, command: Prepare, *, deadline: float) -> None:
        """Get ready for the delivery of the command's token, in place of any other. Raises `TransportError`, and
        `LocalProtocolError` for what cannot be delivered; in the phase `NEVER` where another attempt ends likewise.
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
            if self._wanted == _NONE:  # weights have gone another way since; what was worked out is kept
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
        # where the trainer's parts are changes from push to push, and is looked up in each
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
        """Send, or take, the delivery that was prepared under this token; `slots` are used by nothing else. Raises
        `TransportError`; nothing of it is under way then.
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
        """Let go of what is mapped, unless a delivery is under way: weights take another way now, and whoever has
        shown memory wants it back. One that is being prepared maps nothing.
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
        """The same object each time, so that what is mapped is found again."""
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
    """What is raised in here comes again with the next attempt, as long as all is as it is."""
    try:
        yield
    except kind as error:
        error.phase = NEVER
        raise


def _kept(kept: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What was made for this key, of the last few: places and exposures of each layout, at most."""
    found = kept.pop(key) if key in kept else make()
    kept[key] = found
    for old in list(kept)[: -2 * LAYOUTS]:
        del kept[old]
    return found
