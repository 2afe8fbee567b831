"""What was written into one memory, found by where it lies. Pure.

A bucket has thousands of tensors side by side, and each copy out of it asks what lies where it reads. So stretches are
kept in order as long as no two of them meet, which is nearly always; once two do, all are looked at one by one.
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
    """Bytes of a tensor on offer, as they lie in some memory."""

    name: str
    source: Box  # in the tensor
    own: Box  # in the memory
    source_dtype: torch.dtype
    dtype: torch.dtype  # that they have here

    def touches(self, box: Box, itemsize: int) -> bool:
        """Whether the stretch from its first to its last byte meets that of `box`."""
        return self.own.touches(box, self.dtype.itemsize, itemsize)


class WrittenBoxes:
    """Of one memory."""

    def __init__(self) -> None:
        self._boxes: list[WrittenBox] = []  # by their first bytes while they are apart, then as they were written
        self._firsts: list[int] = []
        self._ends: list[int] = []
        self._apart = True

    def __iter__(self) -> Iterator[WrittenBox]:
        return iter(self._boxes)

    def __bool__(self) -> bool:
        return bool(self._boxes)

    def add(self, several: Iterable[WrittenBox]) -> None:
        """These were written now."""
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
        """Those that a box, which is not empty, touches; the last is the latest where any lie over one another."""
        if not self._apart:
            return [one for one in self._boxes if one.touches(box, itemsize)]
        return self._boxes[bisect_right(self._ends, box.offset) : bisect_left(self._firsts, box.end(itemsize))]

    def forget(self, box: Box, itemsize: int) -> None:
        """Something else was written there."""
        left = [one for one in self._boxes if not one.touches(box, itemsize)]
        self._boxes, self._firsts, self._ends, self._apart = [], [], [], True
        self.add(left)
