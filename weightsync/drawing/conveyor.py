"""Parcels that are packed, or taken out, on one stream while others travel on another: the host only queues.

A buffer of staging memory is used by every n-th parcel. At the sending end it is filled again when the wire is past it,
at the other the wire may have it again when it was emptied; the GPU itself waits for that.
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

_SETTLES = 600.0  # seconds for a GPU to end what was queued: whoever waits for this bridge kills it long before


def device_staged(
    gpu: int, parcels: Sequence[Sequence[Staged]], *, packing: bool, check: Callable[[], object]
) -> DeviceStaged:
    """Copies on this process's GPU `gpu`. Raises `TransportBroken` where there is no room for their tables, and what
    `check` raises, which is called before each.
    """
    device = torch.device("cuda", gpu)
    return DeviceStaged(BoxKernel(device), device, parcels, packing=packing, check=check)


class Conveyor:
    """One delivery at one end, on the GPU `gpu`. A `wire` is the address of the stream on which parcels travel."""

    def __init__(self, gpu: int, copies: DeviceStaged, bases: Ints, buffers: Sequence[int], *, packing: bool) -> None:
        self._copies, self._buffers, self._packing = copies, buffers, packing
        self._device = torch.device("cuda", gpu)
        with torch.cuda.device(self._device):
            copies.begin(bases)
            self._stream: Any = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # on which the bases came
        self._free: list[Any] = [None] * len(buffers)  # past what used each buffer last

    def buffer(self, number: int) -> int:
        """The address at which a parcel lies."""
        return self._buffers[number % len(self._buffers)]

    def before(self, number: int, wire: int) -> None:
        """A parcel is about to travel."""
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
        """Its travel is queued."""
        gone = self._wire(wire).record_event()
        if not self._packing:
            self._stream.wait_event(gone)
            self._copies.launch(number, self.buffer(number), self._stream)
            gone = self._stream.record_event()
        self._free[number % len(self._buffers)] = gone

    def settled(self) -> bool:
        """Whether all that was queued is done."""
        return bool(self._stream.query())

    def settle(self) -> None:
        """Return when nothing is read or written any more, and not before."""
        await_events([self._stream], "a delivery that has failed", deadline=time.monotonic() + _SETTLES)

    def _wire(self, address: int) -> Any:
        return torch.cuda.ExternalStream(address, device=self._device)
