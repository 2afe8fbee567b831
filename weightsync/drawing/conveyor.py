"""Packs or unpacks parcels on one stream while other parcels travel on another. The host only queues.

Each of n staging buffers serves every n-th parcel. The sending end refills a buffer once the wire is past it. At the
receiving end the wire writes into a buffer again once it is unpacked. The GPU itself waits for these events.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from weightsync.device.launch import BoxKernel
from weightsync.device.waiting import await_events
from weightsync.drawing.device import DeviceStaged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.plan.boxes import Ints
    from weightsync.plan.delivery import Staged

__all__ = ["Conveyor", "device_staged"]

_SETTLES = 600.0  # seconds for a GPU to finish its queue: a process that waits for this bridge kills it long before


def device_staged(
    gpu: int, parcels: Sequence[Sequence[Staged]], *, packing: bool, check: Callable[[], object]
) -> DeviceStaged:
    """Make the copies of `parcels` on this process's GPU `gpu`. `check` is called before each parcel's table is made.

    Raises `TransportBroken` if the GPU has no room for the tables, and errors of `check`.
    """
    device = torch.device("cuda", gpu)
    return DeviceStaged(BoxKernel(device), device, parcels, packing=packing, check=check)


class Conveyor:
    """One end of one delivery, on the GPU `gpu`. A `wire` is the address of the stream on which parcels travel."""

    def __init__(self, gpu: int, copies: DeviceStaged, bases: Ints, buffers: Sequence[int], *, packing: bool) -> None:
        self._copies, self._buffers, self._packing = copies, buffers, packing
        self._device = torch.device("cuda", gpu)
        with torch.cuda.device(self._device):
            copies.begin(bases)
            self._stream: Any = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # `begin` queued the bases there
        self._free: list[Any] = [None] * len(buffers)  # for each buffer, an event past its last use

    def buffer(self, number: int) -> int:
        """Return the address of the buffer in which a parcel lies."""
        return self._buffers[number % len(self._buffers)]

    def before(self, number: int, wire: int) -> None:
        """Queue what must precede a parcel's travel: pack it, or wait until its buffer is unpacked."""
        past = self._free[number % len(self._buffers)]
        if not self._packing:
            if past is not None:
                self._wire(wire).wait_event(past)
            return
        if past is not None:
            self._stream.wait_event(past)
        self._copies.launch(number, self.buffer(number), self._stream)
        self._wire(wire).wait_event(self._stream.record_event())

    def after(self, number: int, wire: int) -> None:
        """Queue what follows a parcel's travel, which is queued by now: unpack it, and note when its buffer is free."""
        gone = self._wire(wire).record_event()
        if not self._packing:
            self._stream.wait_event(gone)
            self._copies.launch(number, self.buffer(number), self._stream)
            gone = self._stream.record_event()
        self._free[number % len(self._buffers)] = gone

    def settled(self) -> bool:
        """Whether all queued packing, or unpacking, is done."""
        return bool(self._stream.query())

    def settle(self) -> None:
        """Wait until no copy reads or writes any more."""
        await_events([self._stream], "a delivery that has failed", deadline=time.monotonic() + _SETTLES)

    def _wire(self, address: int) -> Any:
        return torch.cuda.ExternalStream(address, device=self._device)
