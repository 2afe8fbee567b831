"""The blocks of a matrix, with one scale each: where they lie, and which of them a box of the tensor touches. Pure."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

__all__ = ["Grid", "Strip", "strips"]


class Grid(NamedTuple):
    """How a matrix, or each of a stack of them, is cut into blocks; the last block of each dimension may be smaller."""

    lead: tuple[int, ...]  # dimensions of the stack; none for a single matrix
    rows: int
    columns: int
    height: int  # rows of a block
    width: int
    one: bool  # each matrix is one block
    scalar: bool = False  # … and the tensor of a single matrix's scale has no dimensions

    @classmethod
    def of(cls, shape: tuple[int, ...], block: tuple[int, int] | None, *, scalar: bool = False) -> Grid:
        """Make the grid of a tensor of at least two dimensions. If `block` is None, each matrix is one block."""
        rows, columns = shape[-2:]
        height, width = block or (max(1, rows), max(1, columns))
        return cls(shape[:-2], rows, columns, height, width, block is None, scalar)

    @property
    def shape(self) -> tuple[int, ...]:
        """Blocks in each dimension."""
        return (*self.lead, -(-self.rows // self.height), -(-self.columns // self.width))

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of scales. Its elements are in the order of the blocks in `shape`."""
        if not self.one:
            return self.shape
        return self.lead or (() if self.scalar else (min(1, self.rows * self.columns),))

    def corners(self, offset: Sequence[int], shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the scales of the blocks that begin in a box of the tensor: offset and shape in the tensor of scales.

        None if the scale has no dimensions and belongs to another box. If boxes tile the tensor, their scales tile the
        tensor of scales. So each scale is sent by one rank, or by replicas of it.
        """
        first, count = list(offset[:-2]), list(shape[:-2])
        for at, length, step in zip(offset[-2:], shape[-2:], (self.height, self.width), strict=True):
            first.append(-(-at // step))
            count.append(-(-(at + length) // step) - first[-1])
        if not self.one:
            return tuple(first), tuple(count)
        mine = count[-2] * count[-1]
        if not self.lead and self.scalar:
            return ((), ()) if mine else None
        if not self.lead:
            return (0,), (mine,)
        return tuple(first[:-2]), tuple(count[:-2]) if mine else (0,) * len(self.lead)

    def touched(self, offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
        """Return the blocks that a box of at least one element touches, as slices of the grid."""
        steps = (*[1] * len(self.lead), self.height, self.width)
        return tuple(slice(at // step, -(-(at + n) // step)) for at, n, step in zip(offset, shape, steps, strict=True))

    def whole(self, boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
        """Whether boxes, as offset and shape, together hold all elements of each block that they touch."""
        held = np.zeros(self.shape, dtype=np.int64)
        for offset, shape in set(boxes):
            if prod(shape):
                across = [self._lengths(at, n, step) for at, n, step in self._cut(offset, shape)]
                held[self.touched(offset, shape)] += np.multiply.outer(*across)
        full = np.multiply.outer(*[self._lengths(0, n, s) for _, n, s in self._cut((0, 0), (self.rows, self.columns))])
        return bool(((held == 0) | (held == full)).all())

    def _cut(self, offset: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        return zip(offset[-2:], shape[-2:], (self.height, self.width), strict=True)

    def _lengths(self, at: int, length: int, step: int) -> npt.NDArray[np.int64]:
        """Return how many rows, or columns, of each block that it touches a stretch covers."""
        edges = np.clip(np.arange(at // step, -(-(at + length) // step) + 1, dtype=np.int64) * step, at, at + length)
        return edges[1:] - edges[:-1]


class Strip(NamedTuple):
    """Some rows of a box: within one row of blocks, or several whole rows of blocks."""

    start: int  # first row, in the box
    block: int  # row of the grid in which the strip begins
    blocks: int  # rows of the grid
    rows: int  # rows of the strip in each row of the grid


def strips(at: int, length: int, height: int, most: int) -> Iterator[Strip]:
    """Cut rows `at` to `at + length` of a matrix into strips of about `most` rows; blocks are `height` rows high."""
    done = 0
    while done < length:
        block, inside = divmod(at + done, height)
        count = min((length - done) // height, most // height)
        if inside or not count:
            rows = min(height - inside, length - done, max(1, most))
            yield Strip(done, block, 1, rows)
            done += rows
        else:
            yield Strip(done, block, count, height)
            done += count * height
