"""Intersects boxes to find which bytes of which trainer rank an engine rank draws, and where they go. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from weightsync.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weightsync.plan.exposure import Exposure, Part
    from weightsync.plan.table import TensorTable

__all__ = ["Draw", "Wanted", "Wants", "draws", "interleaved"]


class Wanted(NamedTuple):
    """A box of a tensor that an engine rank has a place for."""

    tensor: int  # of the manifest
    offset: tuple[int, ...]  # in the tensor, in elements
    shape: tuple[int, ...]
    itemsize: int
    target: int  # index of one of the rank's own tensors
    at: int  # byte of the target at which the box begins
    strides: tuple[int, ...]  # bytes


class Wants(NamedTuple):
    """The boxes that an engine rank has places for, and where the places are now."""

    boxes: Sequence[Wanted]  # the same object as long as the plan is the same
    targets: Sequence[int]  # addresses in the rank's process, by the boxes' `target`


class Draw(NamedTuple):
    """A copy of a box, unconverted."""

    rank: int  # of the trainer
    part: int  # index of a part that this rank exposes
    source: int  # byte, from where the part begins
    source_strides: tuple[int, ...]
    target: int
    at: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def draws(
    wanted: Iterable[Wanted], exposures: Sequence[Exposure], tensors: TensorTable, *, all_of_it: bool = True
) -> list[Draw]:
    """List the copies that bring the wanted boxes out of what the ranks of a trainer expose.

    With `all_of_it`, no byte may be exposed twice, and `LocalProtocolError` names the first tensor with wanted elements
    that no rank exposes. Without it, elements may be missing, and bytes that are exposed twice are copied twice.
    """
    shown: dict[int, list[tuple[int, int, Part]]] = {}
    for rank, exposure in enumerate(exposures):
        for at, part in enumerate(exposure.parts(tensors)):
            shown.setdefault(part.tensor, []).append((rank, at, part))
    found: list[Draw] = []
    for want in wanted:
        missing = math.prod(want.shape)
        for rank, at, part in shown.get(want.tensor, ()):
            low = tuple(map(max, want.offset, part.offset))
            ends = zip(want.offset, want.shape, part.offset, part.shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            size = tuple(end - first for first, end in zip(low, high, strict=True))
            if any(n <= 0 for n in size):
                continue
            source = _inner(low, part.offset, part.strides)
            onto = want.at + _inner(low, want.offset, want.strides)
            found.append(Draw(rank, at, source, part.strides, want.target, onto, want.strides, size, want.itemsize))
            missing -= math.prod(size)
        if missing and all_of_it:
            what = f"{missing} elements" if missing > 0 else f"all elements, and {-missing} of them twice,"
            how = "are exposed by no rank" if missing > 0 else "are exposed"
            raise LocalProtocolError(f"{what} of {tensors.names[want.tensor]!r} {how}")
    return found


def interleaved(several: Sequence[Draw]) -> list[Draw]:
    """Mix the draws of all ranks in proportion to bytes, so that copying in order reads from all ranks throughout."""
    so_far: dict[int, int] = {}
    total: dict[int, int] = {}
    for draw in several:
        total[draw.rank] = total.get(draw.rank, 0) + draw.nbytes
    places = []
    for draw in several:
        done = so_far.get(draw.rank, 0)
        places.append(done / total[draw.rank] if total[draw.rank] else 0.0)
        so_far[draw.rank] = done + draw.nbytes
    return [several[i] for i in sorted(range(len(several)), key=places.__getitem__)]


def _inner(offset: Sequence[int], origin: Sequence[int], strides: Sequence[int]) -> int:
    return sum((at - first) * step for at, first, step in zip(offset, origin, strides, strict=True))
