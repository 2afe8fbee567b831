"""Strided boxes of bytes, and views of a copy traced back to what was copied. Pure.

A `Box` says which bytes of some memory a view has, and in which order. If memory B was written from memory A box by
box, then a view of B that stays within one of those boxes is also a view of A. `compose` finds that view.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Box", "Dim", "compose", "merge_dims", "split_strides"]


class Box(NamedTuple):
    """Elements of some memory: the first one's offset, and a size and a stride for each dimension.

    Offset and strides are in bytes.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """Whether it has no element."""
        return 0 in self.sizes

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    def end(self, itemsize: int) -> int:
        """Return the byte after the last one. The box must not be empty."""
        return self.offset + self.span + itemsize

    @property
    def span(self) -> int:
        """Bytes from the start of its first element to the start of its last."""
        return sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))

    def within(self, first: int, end: int, itemsize: int) -> bool:
        """Whether all of it lies in bytes `first` to `end`."""
        return first <= self.offset and self.end(itemsize) <= end

    def touches(self, other: Box, itemsize: int, other_itemsize: int) -> bool:
        """Whether the two stretches of memory, from first to last byte, overlap."""
        return self.offset < other.end(other_itemsize) and other.offset < self.end(itemsize)

    def shifted(self, by: int) -> Box:
        """Return the same box, `by` bytes further on."""
        return self._replace(offset=self.offset + by)


class Dim(NamedTuple):
    """A dimension of a view, or one of the parts that it had to be split into."""

    size: int
    stride: int  # bytes in the memory that the view is of
    source: int  # bytes in the memory that was copied from


def compose(view: Box, own: Box, source: Box) -> tuple[int, list[list[Dim]]] | None:
    """Trace a view of a copy back to the memory that was copied.

    Box `own` is the copy, in the memory of `view`; box `source` is the original. Both have equal sizes, and no two
    elements of `own` overlap. Returns the offset of the view's first element in the original's memory, and for each
    dimension of the view the parts that it falls into, outermost first. Returns None if the view goes beyond `own`, or
    is no box of the original's memory.
    """
    if view.empty:
        return None
    order = sorted(range(len(own.sizes)), key=lambda dim: -own.strides[dim])
    own, source = merge_dims(_ordered(own, order), _ordered(source, order))
    radix = list(zip(own.strides, own.sizes, source.strides, strict=True))
    rest = view.offset - own.offset
    if rest < 0:
        return None
    offset, room = source.offset, []
    for stride, size, step in radix:
        at = rest // stride
        if at >= size:
            return None
        rest -= at * stride
        offset += at * step
        room.append(size - 1 - at)
    if rest:
        return None
    dims: list[list[Dim]] = []
    for size, stride in zip(view.sizes, view.strides, strict=True):
        parts = _walk(size, stride, radix, room)
        if parts is None:
            return None
        dims.append(parts)
    return offset, dims


def _ordered(box: Box, order: list[int]) -> Box:
    return Box(box.offset, tuple(box.sizes[dim] for dim in order), tuple(box.strides[dim] for dim in order))


def _walk(size: int, stride: int, radix: list[tuple[int, int, int]], room: list[int]) -> list[Dim] | None:
    """Return the parts of one dimension of a view, outermost first. Subtracts the steps that it walks from `room`."""
    if size == 1 or stride == 0:
        return [Dim(size, stride, 0)]
    at = next((i for i, (step, _, _) in enumerate(radix) if step <= stride), None)
    if at is None or stride % radix[at][0]:
        return None
    step, length, source = radix[at]
    several = stride // step
    if several * (size - 1) <= room[at]:
        room[at] -= several * (size - 1)
        return [Dim(size, stride, several * source)]
    inner = length // several
    if inner < 2 or size % inner or several * (inner - 1) > room[at]:
        return None
    room[at] -= several * (inner - 1)
    outer = _walk(size // inner, stride * inner, radix, room)
    return None if outer is None else [*outer, Dim(inner, stride, several * source)]


def split_strides(stride: int, parts: list[Dim]) -> list[int]:
    """Return the strides of the `parts` into which a dimension with this `stride` was split."""
    strides, step = [], stride
    for part in reversed(parts):
        strides.append(step)
        step *= part.size
    return strides[::-1]


def merge_dims(one: Box, other: Box) -> tuple[Box, Box]:
    """Simplify two boxes of equal sizes: drop dimensions of length 1, and join neighbours if both boxes allow it."""
    sizes: list[int] = []
    first: list[int] = []
    second: list[int] = []
    for size, a, b in zip(one.sizes, one.strides, other.strides, strict=True):
        if size == 1:
            continue
        if sizes and first[-1] == size * a and second[-1] == size * b:
            sizes[-1], first[-1], second[-1] = sizes[-1] * size, a, b
        else:
            sizes.append(size)
            first.append(a)
            second.append(b)
    shape = tuple(sizes)
    return Box(one.offset, shape, tuple(first)), Box(other.offset, shape, tuple(second))
