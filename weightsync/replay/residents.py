"""Which boxes of pushed tensors lie in a worker's parameters: the load plan read backwards.

Each copy of the plan says which box of a pushed tensor a stretch of a parameter holds. So parameters are fingerprinted
as parts of pushed tensors, and the fingerprints of all workers together are compared with those of what was sent.
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
    """The residents of one plan and one manifest."""

    def __init__(self, plan: LoadPlan, manifest: Manifest) -> None:
        """Leaves out copies that convert, and copies whose source is no box of its tensor (every other row, say)."""
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
        self.unseen = tuple(sorted(index[name] for name in unseen))  # tensors of which the worker has more than `held`

    def wanted(self, targets: Sequence[str]) -> tuple[Wanted, ...]:
        """Return the residents as boxes to draw out of a trainer's memory. `targets` gives the targets' numbers."""
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
    """Express a copy in the dimensions of its tensor, which is row-major and has this `shape`.

    `source` is a box of the tensor's bytes; `target` has the same elements. Returns where `source` begins, in elements,
    and `target` with the tensor's dimensions in their order. Returns None if `source` is no box of the tensor.
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
