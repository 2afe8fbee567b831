"""Which bytes of which trainer rank's memory an engine rank draws, and where to: boxes met with boxes. Pure."""

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
    target: int  # which of the rank's own tensors
    at: int  # byte of that at which the box begins
    strides: tuple[int, ...]  # bytes


class Wants(NamedTuple):
    """What an engine rank has places for, and where these are now."""

    boxes: Sequence[Wanted]  # the same object as long as the plan is the same
    targets: Sequence[int]  # addresses in its process, by the boxes' `target`


class Draw(NamedTuple):
    """A box that is copied as it is."""

    rank: int  # of the trainer
    part: int  # of what that exposes
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
    """What has to be copied for all that is wanted, out of what the ranks of a trainer expose, of which no byte is
    exposed twice. Raises `LocalProtocolError` naming the first tensor of which some is wanted that nobody exposes.
    Where not `all_of_it` has to be there, bytes may be there twice, too, and are copied so.
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
            raise LocalProtocolError(f"{missing} elements of {tensors.names[want.tensor]!r} are exposed by no rank")
    return found


def interleaved(several: Sequence[Draw]) -> list[Draw]:
    """The same, ranks in turn by bytes, so that whoever copies them in order reads from all ranks all the time."""
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
