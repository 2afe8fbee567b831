"""Draws the boxes that a worker's load plan wants out of the memory that a trainer's ranks expose.

    drawer = Drawer(gpu)
    why_not = drawer.draw(exposures, wants, manifest, deadline=...)

If `draw` returns "", everything has been read. The copies are worked out once for a layout and kept, and so is the
mapping of the trainer's memory: a second push of a layout is one launch. Weights that have moved since are mapped anew,
but their copies are not worked out again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from weightsync.drawing.host import HostCopies
from weightsync.errors import TransportTimeout, WeightSyncError
from weightsync.ipc.regions import RegionMap
from weightsync.plan.draws import draws, interleaved
from weightsync.plan.exposure import Exposure
from weightsync.plan.replay_facts import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.drawing.device import DeviceCopies
    from weightsync.plan.boxes import Ints
    from weightsync.plan.draws import Draw, Wanted, Wants
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["Drawer"]

logger = logging.getLogger(__name__)


class _Known(NamedTuple):
    boxes: Sequence[Wanted]
    key: tuple[bytes, ...]  # digests of the manifest, and of the shapes of what ranks expose
    copies: HostCopies | DeviceCopies


class _Read(NamedTuple):
    """The exposures of the last draw, unpacked."""

    key: tuple[bytes, bytes]  # digests of the exposures and of the manifest
    ranks: tuple[Exposure, ...]


class Drawer:
    """Draws for one worker, whose weights lie on its GPU `gpu`, or in host memory if that is None."""

    def __init__(self, gpu: int | None) -> None:
        self._gpu = gpu
        self._regions = RegionMap(gpu)
        self._known: list[_Known] = []  # the last one used comes last
        self._read: _Read | None = None
        self._refused: tuple[bytes, str] | None = None  # digest of exposures that cannot be read here, and why
        self._running: HostCopies | DeviceCopies | None = None  # a copy that has not ended

    def draw(self, exposures: Exposures, wants: Wants, manifest: Manifest, *, deadline: float) -> str:
        """Copy all that is wanted of the manifest's tensors. On a GPU, also wait for the current stream's work.

        Returns "", or why nothing was read: the memory cannot be mapped, a wanted box is not exposed, or there is no
        room for tables. Raises `TransportTimeout` if a copy does not end in time.
        """
        if self._refused is not None and self._refused[0] == exposures.digest:
            return self._refused[1]
        try:
            ranks = self._ranks(exposures, manifest)
            with self._regions.mapped(ranks) as regions:
                copies = self._copies(ranks, wants.boxes, manifest)
                parts = [one.addresses(begin) for one, begin in zip(ranks, regions, strict=True)]
                self._run(copies, wants.targets, parts, deadline)
        except TransportTimeout:
            raise
        except WeightSyncError as error:
            logger.warning("weightsync: the trainer's memory is not read in place: %s", error)
            self._refused = exposures.digest, str(error)
            return str(error)
        return ""

    def _run(
        self, copies: HostCopies | DeviceCopies, targets: Sequence[int], parts: Sequence[Ints], deadline: float
    ) -> None:
        self._regions.held, self._running = True, copies
        copies.run(targets, parts, deadline=deadline)
        self._regions.held, self._running = False, None

    def settle(self, *, deadline: float) -> None:
        """Wait for a copy that did not end in time, if there is one. Raises `TransportTimeout`."""
        if self._running is not None:
            self._running.settle(deadline=deadline)
            self._regions.held, self._running = False, None

    def release(self) -> None:
        """Unmap the trainer's memory, unless a copy that did not end in time may still read it."""
        if self._running is None:
            self._regions.release()

    def _ranks(self, exposures: Exposures, manifest: Manifest) -> tuple[Exposure, ...]:
        key = exposures.digest, manifest.digest
        if self._read is None or self._read.key != key:
            self._read = _Read(key, tuple(Exposure.unpack(rank, manifest.tensors) for rank in exposures.ranks))
        return self._read.ranks

    def _copies(
        self, ranks: Sequence[Exposure], boxes: Sequence[Wanted], manifest: Manifest
    ) -> HostCopies | DeviceCopies:
        key = manifest.digest, *(one.shapes_digest for one in ranks)
        for at, known in enumerate(self._known):
            if known.boxes is boxes and known.key == key:
                self._known.append(self._known.pop(at))
                return known.copies
        copies = self._made(interleaved(draws(boxes, ranks, manifest.tensors)))
        self._known = [*self._known[1 - LAYOUTS :], _Known(boxes, key, copies)]
        return copies

    def _made(self, several: list[Draw]) -> HostCopies | DeviceCopies:
        if self._gpu is None:
            return HostCopies(several)
        from weightsync.drawing.device import DeviceCopies

        return DeviceCopies.on(self._gpu, several)
