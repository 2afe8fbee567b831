"""Shows a worker's places for the boxes that its load plan wants, so that bridges of its node write there.

    places = Places(gpu)
    shown = places.show(wants, width)     an `Exposure`, or why there is none
    …                                     others write
    places.land(wants)                    brings it into the parameters

On a GPU the places are in the parameters themselves, in host memory in a `Landing`. The exposure is worked out once for
a layout. It stays the same, byte for byte, as long as nothing has moved.
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
    """The places of one worker, whose weights lie on its GPU `gpu`, or in host memory if that is None."""

    def __init__(self, gpu: int | None) -> None:
        self._gpu = gpu
        self._boxes: Sequence[Wanted] | None = None  # those asked for last
        self._kept: Landing | _InPlace | None = None  # the places of these boxes
        self._refused: tuple[list[int], str] | None = None  # targets that no other process can write into, and why

    def show(self, wants: Wants, width: int) -> Exposure | str:
        """Return the places where others may write all that is wanted, or why not. `width` is the manifest's."""
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
            if self._kept is not None:  # its memory can never be shared; a landing may find room next time
                self._refused = list(wants.targets), str(error)
            return str(error)
        self._refused = None
        return shown

    def land(self, wants: Wants) -> None:
        """Bring the weights into the parameters, once others have written all places shown for `wants`."""
        assert self._kept is not None, "it was shown"
        self._kept.land(wants.targets)

    def release(self) -> None:
        """Free the landing, if there is one. The next `show` makes another."""
        if isinstance(self._kept, Landing):
            self._kept.close()
            self._kept = None

    def _made(self, boxes: Sequence[Wanted], width: int) -> Landing | _InPlace:
        return Landing(boxes, width) if self._gpu is None else _InPlace(self._gpu, boxes, width)


class _InPlace:
    """Places in the parameters themselves, on this process's GPU `gpu`."""

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
        """Return the exposure of the places. Raises `TransportBroken` for memory that cannot be shared."""
        import torch

        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()  # work queued here must not run after others have written
            if self._found is not None and self._found.current and self._targets == targets:
                return self._exposure
            begins = np.array([*targets, 0], dtype=np.uint64).view(np.int64)
            self._found = found = located(begins[self._target] + self._inner, self._uuid)
        region = found.region.astype(np.int32)
        self._exposure = replace(self._exposure, regions=found.regions, region=region, at=found.at)
        self._targets = list(targets)
        return self._exposure

    def land(self, targets: Sequence[int]) -> None:
        """Do nothing: others have written into the parameters themselves."""
