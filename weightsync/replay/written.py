"""Keeps what was written into one memory, and finds it by where it lies. Pure.

A bucket has thousands of tensors side by side, and each copy out of it asks what lies where it reads. So boxes are kept
sorted while no two of them overlap, which is nearly always the case. Once two overlap, a search looks at all of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from weightsync.replay.strided import Box

__all__ = ["WrittenBox", "WrittenBoxes"]


class WrittenBox(NamedTuple):
    """Bytes of an offered tensor, as they lie in some memory."""

    name: str
    source: Box  # in the tensor
    own: Box  # in the memory
    source_dtype: torch.dtype
    dtype: torch.dtype  # that they have here

    def touches(self, box: Box, itemsize: int) -> bool:
        """Whether its stretch, from first to last byte, overlaps that of `box`."""
        return self.own.touches(box, self.dtype.itemsize, itemsize)


class WrittenBoxes:
    """The boxes that were written into one memory."""

    def __init__(self) -> None:
        self._boxes: list[WrittenBox] = []  # sorted by first byte while they are apart; later ones in order of writing
        self._firsts: list[int] = []
        self._ends: list[int] = []
        self._apart = True

    def __iter__(self) -> Iterator[WrittenBox]:
        return iter(self._boxes)

    def __bool__(self) -> bool:
        return bool(self._boxes)

    def add(self, several: Iterable[WrittenBox]) -> None:
        """Add boxes that were written now."""
        for one in several:
            first, end = one.own.offset, one.own.end(one.dtype.itemsize)
            at = bisect_left(self._firsts, first) if self._apart else len(self._boxes)
            if self._apart and (
                (at and self._ends[at - 1] > first) or (at < len(self._firsts) and self._firsts[at] < end)
            ):
                self._apart, at = False, len(self._boxes)
            self._boxes.insert(at, one)
            if self._apart:
                self._firsts.insert(at, first)
                self._ends.insert(at, end)

    def touching(self, box: Box, itemsize: int) -> list[WrittenBox]:
        """Return the boxes that touch `box`, which is not empty. If any of them overlap, the last was written last."""
        if not self._apart:
            return [one for one in self._boxes if one.touches(box, itemsize)]
        return self._boxes[bisect_right(self._ends, box.offset) : bisect_left(self._firsts, box.end(itemsize))]

    def forget(self, box: Box, itemsize: int) -> None:
        """Drop the boxes that touch `box`, because something else was written there."""
        left = [one for one in self._boxes if not one.touches(box, itemsize)]
        self._boxes, self._firsts, self._ends, self._apart = [], [], [], True
        self.add(left)
