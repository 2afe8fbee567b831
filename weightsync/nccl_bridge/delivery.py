"""Slices of weights from one node straight into an engine of another: out of the memory that a trainer exposes there,
through this bridge's communicator, into the places that the engine shows here.

The sending bridge packs a piece into its staging memory, its slots, while the last one is on the wire; the other takes
pieces out of its own while the next arrives. Both know what is in a piece by what the engine has shown. Nothing here is
checked: what lies in the engine afterwards is compared, tensor by tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from weightsync.drawing.host import HostStaged
from weightsync.errors import TransportBroken, TransportTimeout
from weightsync.ipc.regions import RegionMap
from weightsync.plan.delivery import incoming, outgoing, pieces_of
from weightsync.plan.exposure import Exposure
from weightsync.plan.told import SeenExposures, SeenManifests
from weightsync.replay.facts import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from weightsync.drawing.device import DeviceStaged
    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.nccl_bridge.commands import Collect, Deliver
    from weightsync.nccl_bridge.gloo import GlooCommunicator
    from weightsync.nccl_bridge.nccl import NcclCommunicator
    from weightsync.plan.boxes import Ints
    from weightsync.plan.delivery import Piece, Staged
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["Deliveries"]

_ROOT = 0  # of every communicator: the bridge of the node that coordinates

T = TypeVar("T")


class _Way(Protocol):
    """How pieces travel: in host memory, or on a GPU."""

    def staged(self, pieces: Sequence[Sequence[Staged]], *, packing: bool) -> HostStaged | DeviceStaged:
        """Copies, worked out once."""

    def run(self, communicator: Any, job: _Job, *, deadline: float) -> None:
        """Send all pieces, or take them."""


class _Job(NamedTuple):
    """One delivery at one end."""

    pieces: Sequence[Piece]
    copies: HostStaged | DeviceStaged
    bases: Ints
    slots: Sequence[int]  # that are free for it
    most: int  # bytes of a piece
    token: int
    packing: bool


class Deliveries:
    """Those of one bridge, sent and taken. What was worked out for a layout is kept, and what is mapped stays so."""

    def __init__(self, arena: Arena, slots: DeviceSlots | None) -> None:
        gpu = slots.device if slots is not None else None
        self._way: _Way = _HostWay(arena) if slots is None else _DeviceWay(slots, arena.slot_bytes)
        self._sources, self._targets = RegionMap(gpu), RegionMap(gpu, writable=True)
        self._manifests, self._exposures, self._places = SeenManifests(), SeenExposures(), SeenExposures()
        self._read: dict[Hashable, tuple[Exposure, ...]] = {}  # the latest last, as all three
        self._pieces: dict[Hashable, list[Piece]] = {}
        self._copies: dict[Hashable, HostStaged | DeviceStaged] = {}

    def send(
        self,
        communicator: GlooCommunicator | NcclCommunicator,
        command: Deliver,
        slots: Sequence[int],
        *,
        deadline: float,
    ) -> None:
        """Send what the engine's ranks have places for. `slots` are free. Raises `TransportError`; nothing of this is
        under way then, or it is a `TransportTimeout`.
        """
        manifest = self._manifests.of(command.manifest)
        sources = self._exposures_of(self._exposures.of(command.exposures), None, manifest)
        key, pieces = self._planned(command, manifest)
        shapes = tuple(one.shapes_digest for one in sources)
        with self._sources.mapped(sources) as begins:
            copies = self._worked_out(
                (key, shapes), lambda: self._way.staged(outgoing(pieces, sources, manifest.tensors), packing=True)
            )
            bases = np.concatenate([one.addresses(begin) for one, begin in zip(sources, begins, strict=True)])
            job = _Job(pieces, copies, bases, slots, command.piece, command.token, packing=True)
            self._run(self._sources, communicator, job, deadline)

    def collect(
        self,
        communicator: GlooCommunicator | NcclCommunicator,
        command: Collect,
        slots: Sequence[int],
        *,
        deadline: float,
    ) -> None:
        """Take what is sent, into the engine's places. Otherwise as `send`."""
        manifest = self._manifests.of(command.manifest)
        key, pieces = self._planned(command, manifest)
        places = self._exposures_of(self._places.of(command.places), command.ranks, manifest)
        with self._targets.mapped(places) as begins:
            copies = self._worked_out(key, lambda: self._way.staged(incoming(pieces), packing=False))
            job = _Job(pieces, copies, np.concatenate(begins), slots, command.piece, command.token, packing=False)
            self._run(self._targets, communicator, job, deadline)

    def _run(
        self, regions: RegionMap, communicator: GlooCommunicator | NcclCommunicator, job: _Job, deadline: float
    ) -> None:
        regions.held = True  # a kernel that meets its end must not find its memory gone
        try:
            self._way.run(communicator, job, deadline=deadline)
        except TransportTimeout:
            raise
        except BaseException:
            regions.held = False
            raise
        regions.held = False

    def _planned(self, command: Deliver | Collect, manifest: Manifest) -> tuple[Hashable, list[Piece]]:
        """The pieces, and what they depend on."""
        shown = self._places.of(command.places)
        key = manifest.digest, shown.digest, command.ranks, command.piece, command.turn, command.turns

        def work_out() -> list[Piece]:
            places = self._exposures_of(shown, command.ranks, manifest)
            return pieces_of(places, manifest.tensors, command.piece, turn=command.turn, turns=command.turns)

        return key, _kept(self._pieces, key, work_out)

    def _worked_out(
        self, key: Hashable, work_out: Callable[[], HostStaged | DeviceStaged]
    ) -> HostStaged | DeviceStaged:
        return _kept(self._copies, key, work_out)

    def _exposures_of(self, told: Exposures, ranks: Sequence[int] | None, manifest: Manifest) -> tuple[Exposure, ...]:
        """Those of these ranks, or of all: the same object each time, so that what is mapped is found again."""
        mine = tuple(range(len(told.ranks))) if ranks is None else tuple(ranks)

        def read() -> tuple[Exposure, ...]:
            if any(rank >= len(told.ranks) for rank in mine):
                raise TransportBroken(f"rank {max(mine)} of {len(told.ranks)} is to be delivered to")
            return tuple(Exposure.unpack(told.ranks[rank], manifest.tensors) for rank in mine)

        return _kept(self._read, (told.digest, mine, manifest.digest), read)


def _kept(kept: dict[Hashable, T], key: Hashable, make: Callable[[], T]) -> T:
    """What was made for this key, of the last few."""
    found = kept.pop(key) if key in kept else make()
    kept[key] = found
    for old in list(kept)[: -2 * LAYOUTS]:
        del kept[old]
    return found


class _HostWay:
    """One piece after the other, in the first slot."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def staged(self, pieces: Sequence[Sequence[Staged]], *, packing: bool) -> HostStaged:
        return HostStaged(pieces, packing=packing)

    def run(self, communicator: Any, job: _Job, *, deadline: float) -> None:
        assert isinstance(job.copies, HostStaged), "slots are in host memory"
        _agree(communicator, job.token, deadline)
        memory = np.frombuffer(self._arena.slot(job.slots[0]), dtype=np.uint8)
        address = int(memory.ctypes.data)
        for number, piece in enumerate(job.pieces):
            if job.packing:
                job.copies.run(number, job.bases, address)
            communicator.broadcast(memory[: piece.nbytes].data, _ROOT, deadline=deadline)
            if not job.packing:
                job.copies.run(number, job.bases, address)


def _agree(communicator: GlooCommunicator, token: int, deadline: float) -> None:
    """Raise `TransportBroken` where the sending end is in another delivery."""
    seal = np.array([token], dtype=np.uint64)
    communicator.broadcast(seal.view(np.uint8).data, _ROOT, deadline=deadline)
    if int(seal[0]) != token:
        raise TransportBroken("the other end is in another delivery: they come in other orders")


class _DeviceWay:
    """Packing, the wire and unpacking at the same time."""

    def __init__(self, slots: DeviceSlots, slot_bytes: int) -> None:
        self._slots, self._slot_bytes = slots, slot_bytes

    def staged(self, pieces: Sequence[Sequence[Staged]], *, packing: bool) -> DeviceStaged:
        from weightsync.drawing.conveyor import device_staged

        return device_staged(self._slots.device, pieces, packing=packing)

    def run(self, communicator: Any, job: _Job, *, deadline: float) -> None:
        from weightsync.drawing.conveyor import Conveyor

        assert not isinstance(job.copies, HostStaged), "slots are on a GPU"
        buffers = [
            self._slots.slot(slot) + first
            for slot in job.slots
            for first in range(0, self._slot_bytes - job.most + 1, job.most)
        ]
        conveyor = Conveyor(self._slots.device, job.copies, job.bases, buffers, packing=job.packing)
        try:
            communicator.stream(
                [(conveyor.buffer(number), piece.nbytes) for number, piece in enumerate(job.pieces)],
                job.token,
                _ROOT,
                before=conveyor.before,
                after=conveyor.after,
                settled=conveyor.settled,
                deadline=deadline,
            )
        except BaseException:
            conveyor.settle()
            raise
