"""Shows where a worker has places for what its load plan wants, so that bridges of its node write there.

    places = Places(gpu)
    shown = places.show(wants, width)     an `Exposure`, or why there is none
    …                                     others write
    places.land(wants)                    the parameters have it

On a GPU the places are in the parameters themselves; in host memory in a `Landing`. What is shown is worked out once
for a layout, and is the same, byte for byte, as long as nothing has moved.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from weightsync.drawing.landing import Landing
from weightsync.errors import TransportBroken
from weightsync.ipc.allocations import Located, located
from weightsync.plan.exposure import Exposure, Part
from weightsync.processes import started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.draws import Wanted, Wants

__all__ = ["Places"]

logger = logging.getLogger(__name__)


class Places:
    """Of one worker, whose weights lie on its GPU `gpu`, or in host memory if that is None."""

    def __init__(self, gpu: int | None) -> None:
        self._gpu = gpu
        self._boxes: Sequence[Wanted] | None = None  # that were asked for last
        self._kept: Landing | _InPlace | None = None  # for these
        self._refused: tuple[list[int], str] | None = None  # targets that nobody else can write into, and why

    def show(self, wants: Wants, width: int) -> Exposure | str:
        """Where all that is wanted of tensors of a manifest of this `width` may be written; or why that cannot be."""
        if self._boxes is not wants.boxes:
            self.release()
            self._boxes, self._kept, self._refused = wants.boxes, None, None
        if self._refused is not None and self._refused[0] == wants.targets:
            return self._refused[1]
        try:
            if self._kept is None:
                self._kept = self._made(wants.boxes, width)
            shown = self._kept.show(wants.targets)
        except TransportBroken as error:
            logger.warning("weightsync: this worker has no places to show: %s", error)
            if self._kept is not None:  # its memory cannot be shared; for a landing there may be room another time
                self._refused = list(wants.targets), str(error)
            return str(error)
        self._refused = None
        return shown

    def land(self, wants: Wants) -> None:
        """All places that `show` told of for these are written: have it in the parameters."""
        assert self._kept is not None, "it was shown"
        self._kept.land(wants.targets)

    def release(self) -> None:
        """Give back host memory; there is another landing when it is asked for."""
        if isinstance(self._kept, Landing):
            self._kept.close()
            self._kept = None

    def _made(self, boxes: Sequence[Wanted], width: int) -> Landing | _InPlace:
        return Landing(boxes, width) if self._gpu is None else _InPlace(self._gpu, boxes, width)


class _InPlace:
    """In the parameters, on the GPU `gpu` of this process."""

    def __init__(self, gpu: int, boxes: Sequence[Wanted], width: int) -> None:
        import torch

        self._device = torch.device("cuda", gpu)
        self._uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        self._target = np.array([box.target for box in boxes], dtype=np.int64)
        self._inner = np.array([box.at for box in boxes], dtype=np.int64)
        parts = [Part(box.tensor, box.offset, box.shape, 0, 0, box.strides) for box in boxes]
        pid = os.getpid()
        self._exposure = Exposure.of(pid, started(pid), [], parts, width)
        self._targets: list[int] = []
        self._found: Located | None = None

    def show(self, targets: Sequence[int]) -> Exposure:
        """What others may write into. Raises `TransportBroken` for memory that cannot be shared."""
        import torch

        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()  # what is queued here must not come after what others write
            if self._found is not None and self._found.current and self._targets == targets:
                return self._exposure
            begins = np.array([*targets, 0], dtype=np.uint64).view(np.int64)
            self._found = found = located(begins[self._target] + self._inner, self._uuid)
        region = found.region.astype(np.int32)
        self._exposure = replace(self._exposure, regions=found.regions, region=region, at=found.at)
        self._targets = list(targets)
        return self._exposure

    def land(self, targets: Sequence[int]) -> None:
        """It was written where it belongs."""
