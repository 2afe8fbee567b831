"""Writes one rank's parts into slots in one push, as leases come, and tells the daemon of each full bucket."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsync.errors import RemoteProtocolError
from weightsync.filling.host import HostFill
from weightsync.trainer.rank_memory import memory
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.filling.device import DeviceFill, DeviceProgram
    from weightsync.filling.local import LocalWeights
    from weightsync.filling.program import Program
    from weightsync.ipc.arena import Arena
    from weightsync.sources.base import Source

__all__ = ["RankFilling"]


class RankFilling:
    """One rank's filling in one push. It begins when the plan is known; `advance` tells the daemon of full buckets."""

    def __init__(
        self,
        source: Source,
        program: Program,
        key: bytes,
        offers: tuple[bytes, ...],
        *,
        local: LocalWeights | None,
        ready: Sequence[Any],
        deadline: float,
        tell: Callable[[msg.Message], None],
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """`key` is the program's; `offers` are those of the node's arenas. `local` says where the weights lie, if this
        process uses GPUs. `ready` are events past the kernels that compute them. `on_progress` is called after each
        bucket with the bytes written so far. Raises `RemoteProtocolError` if a bucket of the plan exceeds a slot.
        """
        self.left = program.buckets  # buckets in which this rank has parts that it has not written
        self.seconds = 0.0  # during which at least one bucket was being written
        self._program, self._key, self._tell, self._on_progress = program, key, tell, on_progress
        self._written = 0
        self._since = 0.0
        self._on_gpu: DeviceProgram | None = None
        arenas = memory().map_arenas(offers)
        room = min(arena.slot_bytes for arena in arenas)
        if program.longest > room:
            raise RemoteProtocolError(f"a plan with buckets of {program.longest} bytes, and slots of {room}")
        self.on_gpus = arenas[0].memory is not None
        if self.on_gpus:
            self._fill: HostFill | DeviceFill = self._into_gpus(source, offers, local, ready)
        else:
            self._fill = self._into_host_memory(source, arenas, ready, deadline)

    @property
    def busy(self) -> bool:
        """Whether a bucket was begun that the daemon has not been told of."""
        return self._fill.busy

    def begin(self, lease: msg.Lease) -> None:
        """Write this rank's parts of a bucket. Raises `SourceError`, or `RemoteProtocolError` for an unknown bucket."""
        if lease.bucket >= len(self._program.writes):
            raise RemoteProtocolError(f"a lease for bucket {lease.bucket} that is not in the plan")
        if not self.busy:
            self._since = time.monotonic()
        self._fill.begin(lease.bucket, lease.bridge, lease.slot)

    def advance(self) -> None:
        """Tell the daemon of buckets that have become full. Raises errors of the GPU."""
        for full in self._fill.finished():
            self._tell(
                msg.Filled(
                    bucket=full.bucket,
                    nbytes=full.nbytes,
                    tensors=np.fromiter(full.sums.keys(), dtype="<u4", count=len(full.sums)).tobytes(),
                    fingerprints=np.fromiter(full.sums.values(), dtype="<u8", count=len(full.sums)).tobytes(),
                )
            )
            self._written += full.nbytes
            self.left -= 1
            if self._on_progress is not None:
                self._on_progress(self._written)
        if not self.busy:
            self.seconds += time.monotonic() - self._since

    def close(self, *, deadline: float) -> None:
        """Wait for the work under way; nothing is written into a slot afterwards.

        Raises `TransportTimeout`, or `TransportBroken` for an error of the GPU.
        """
        self._fill.close(deadline=deadline)
        if self._on_gpu is not None:
            memory().give_device_program(self._key, self._on_gpu)

    def _into_host_memory(
        self, source: Source, arenas: Sequence[Arena], ready: Sequence[Any], deadline: float
    ) -> HostFill:
        if ready:
            from weightsync.device.waiting import await_events

            await_events(ready, "what computes the weights", deadline=deadline)
        return HostFill(source, self._program, arenas)

    def _into_gpus(
        self, source: Source, offers: tuple[bytes, ...], local: LocalWeights | None, ready: Sequence[Any]
    ) -> DeviceFill:
        from weightsync.filling import device as on_device
        from weightsync.filling.local import LocalWeights

        local = local or LocalWeights(source)
        gpu = on_device.rank_device(local)
        known = memory().take_device_program(self._key)
        if known is None or not known.fits(local, gpu):
            known = on_device.DeviceProgram(self._program, local, gpu)
        known.update(local)
        self._on_gpu = known
        slots = [memory().map_slots(offer, gpu.index) for offer in offers]
        return on_device.DeviceFill(source, known, slots, ready)
