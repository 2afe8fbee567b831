"""A rank's weights where they lie: addresses, strides, types, and when they are what they should be."""

from __future__ import annotations

import threading
import time
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from weightsync.errors import TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.sources.base import Source

__all__ = ["LocalWeights", "await_events"]

_DTYPE = attrgetter("dtype")
_NOWHERE = torch.empty(0, dtype=torch.uint8, device="cpu")
_GLANCE = 50e-6  # seconds between two looks at a GPU


class LocalWeights:
    """This rank's memory by shard, None where a shard lies in no tensor. Of 19,000 tensors in 7 ms."""

    def __init__(self, source: Source) -> None:
        self.tensors: list[torch.Tensor | None] = list(map(source.local, range(len(source.layout()))))
        known = [_NOWHERE if tensor is None else tensor for tensor in self.tensors]
        self.pointers = list(map(torch.Tensor.data_ptr, known))
        self.strides = list(map(torch.Tensor.stride, known))
        self.dtypes = list(map(_DTYPE, known))

    @property
    def devices(self) -> list[torch.device]:
        """Where each lies."""
        return [_NOWHERE.device if tensor is None else tensor.device for tensor in self.tensors]

    def ready(self) -> list[torch.cuda.Event]:
        """For each GPU that they lie on, an event past all that the calling thread has asked that GPU for so far, such
        as the optimiser's last step.
        """
        events = []
        for device in {device for device in self.devices if device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return events


def await_events(events: Iterable[torch.cuda.Event | torch.cuda.Stream], what: str, *, deadline: float) -> None:
    """Return when all of them have come. Raises `TransportTimeout` naming `what`."""
    pause = threading.Event()
    for event in events:
        while not event.query():
            if time.monotonic() >= deadline:
                raise TransportTimeout(f"{what} is still under way on this rank's GPU")
            pause.wait(_GLANCE)
