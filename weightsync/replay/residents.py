"""What lies in a worker's parameters, tensor by tensor as the trainer knows them: the load plan read backwards.

A copy of the plan says which box of a pushed tensor a stretch of a parameter is. So the parameters can be fingerprinted
as parts of the tensors that were pushed, and whoever has the parts of all workers can compare them with what was sent.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Wanted
from weightsync.plan.residents import ResidentBoxes
from weightsync.replay.plan import NOT_SEEN
from weightsync.replay.strided import Box

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.manifest import Manifest
    from weightsync.replay.plan import LoadPlan

__all__ = ["Resident", "Residents", "resident_box"]


class Resident(NamedTuple):
    """A box of a tensor of the manifest, and where a parameter has it."""

    tensor: int
    offset: tuple[int, ...]  # in the tensor, in elements
    shape: tuple[int, ...]
    itemsize: int
    target: str
    box: Box  # from where the target begins, with the tensor's dimensions


class Residents:
    """Of one plan and one manifest."""

    def __init__(self, plan: LoadPlan, manifest: Manifest) -> None:
        """What is converted on its way, or is no box of its tensor (every other row, say), is left out."""
        self._width = manifest.tensors.width
        self.shapes = manifest.tensors.shapes  # of all tensors of the manifest
        index, shapes = manifest.tensors.index, self.shapes
        found, unseen = [], {name for name, why in plan.loader_sources.items() if why != NOT_SEEN}
        for copy in plan.copies:
            tensor = index[copy.source]
            placed = resident_box(shapes[tensor], copy.dtype.itemsize, copy.source_box, copy.target_box)
            if copy.source_dtype != copy.dtype or placed is None:
                unseen.add(copy.source)
            else:
                offset, box = placed
                found.append(Resident(tensor, offset, box.sizes, copy.dtype.itemsize, copy.target, box))
        self.held = tuple(found)
        self.complete = len(found) == len(plan.copies)
        self.unseen = tuple(sorted(index[name] for name in unseen))  # tensors of which it has more than it can tell

    def wanted(self, targets: Sequence[str]) -> tuple[Wanted, ...]:
        """The same as what is to be drawn out of a trainer's memory, into targets counted in this order."""
        at = {name: index for index, name in enumerate(targets)}
        return tuple(
            Wanted(one.tensor, one.offset, one.shape, one.itemsize, at[one.target], one.box.offset, one.box.strides)
            for one in self.held
        )

    @cached_property
    def packed(self) -> bytes:
        """The boxes in the order of their fingerprints (`sums.py`), as packed `ResidentBoxes`."""
        boxes = [(one.tensor, one.offset, one.shape) for one in self.held]
        return ResidentBoxes.of(boxes, self._width, unseen=self.unseen).pack()


def resident_box(shape: tuple[int, ...], itemsize: int, source: Box, target: Box) -> tuple[tuple[int, ...], Box] | None:
    """Where in a row-major tensor of `shape` the box `source` of its bytes begins, and `target`, which has the same
    elements, with the tensor's dimensions in their order. None if `source` is no box of the tensor.
    """
    steps = packed_strides(shape, itemsize)
    offset, rest = [], source.offset
    for step in steps:
        offset.append(rest // step if step else 0)
        rest -= offset[-1] * step
    if rest or source.empty:
        return None
    sizes, strides = [1] * len(shape), [itemsize] * len(shape)
    for size, stride, onto in zip(source.sizes, source.strides, target.strides, strict=True):
        while size > 1:
            dim = next((d for d, s in enumerate(steps) if s == stride and shape[d] > 1 and sizes[d] == 1), None)
            if dim is None:
                return None
            room = shape[dim] - offset[dim]
            if size > room and (offset[dim] or size % shape[dim]):
                return None
            sizes[dim], strides[dim] = min(size, shape[dim]), onto
            size, stride, onto = size // sizes[dim], stride * sizes[dim], onto * sizes[dim]
    return tuple(offset), Box(target.offset, tuple(sizes), tuple(strides))
