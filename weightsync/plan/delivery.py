"""Plans deliveries: which parcels carry a trainer's weights to places in engines on other nodes. Pure.

Both ends work out the same parcels: stretches of staging memory in which boxes of tensors lie one after the other, row
by row. Parcels carry either the boxes that one engine has shown, or a share of the whole model for any number of
engines. In the first case each rank of the engine gets its own boxes by the nearest way. The sending end fills a parcel
from what the trainer's ranks expose. The other ends empty it into the places of all ranks that have room for some of
it.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from weightsync.errors import LocalProtocolError
from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Wanted, draws, interleaved
from weightsync.plan.exposure import Exposure, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from weightsync.plan.draws import Draw
    from weightsync.plan.table import TensorTable

__all__ = ["Box", "Parcel", "Placed", "Staged", "boxes_of", "incoming", "outgoing", "parcels_of", "share_of"]

_ALIGN = 64  # bytes
_OFTEN = 1024  # boxes between two checks

T = TypeVar("T")


class Box(NamedTuple):
    """A box of a tensor of the manifest."""

    tensor: int
    offset: tuple[int, ...]  # in the tensor, in elements
    shape: tuple[int, ...]


class Placed(NamedTuple):
    """A box, and where it lies in its parcel."""

    box: Box
    itemsize: int
    begin: int  # byte of the parcel


class Parcel(NamedTuple):
    """Boxes that travel together."""

    nbytes: int
    boxes: tuple[Placed, ...]


class Staged(NamedTuple):
    """A copy between a parcel in staging memory and mapped memory. All strides are in bytes."""

    begin: int  # byte of the parcel
    packed: tuple[int, ...]  # strides in the parcel
    base: int  # index of the mapped memory: of a part in `outgoing`, of a region in `incoming`
    at: int  # byte of that memory
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int


def boxes_of(places: Sequence[Exposure], tensors: TensorTable, *, turn: int = 0, turns: int = 1) -> list[Box]:
    """List the boxes that these ranks of an engine have places for, each once, in the order of the manifest.

    Each of `turns` simultaneous deliveries begins elsewhere in the model. So all ranks of a trainer send all the time,
    even if each of them holds only some of the layers.
    """
    found = {Box(part.tensor, part.offset, part.shape) for one in places for part in one.parts(tensors)}
    boxes = sorted(found)
    first = len(boxes) * turn // turns
    return boxes[first:] + boxes[:first]


def share_of(tensors: TensorTable, *, turn: int = 0, turns: int = 1) -> list[Box]:
    """List the tensors whose first byte lies in stretch `turn`, if the model is cut into `turns` equal stretches."""
    sizes = tensors.sizes.tolist()
    total = sum(sizes)
    begins = accumulate(sizes[:-1], initial=0)
    mine = [index for index, begin in enumerate(begins) if sizes[index] and begin * turns // total == turn]
    return [Box(index, (0,) * len(tensors.shapes[index]), tensors.shapes[index]) for index in mine]


def parcels_of(
    boxes: Iterable[Box], tensors: TensorTable, most: int, check: Callable[[], object] = lambda: None
) -> list[Parcel]:
    """Pack these boxes into parcels of at most `most` bytes, which must be at least 64.

    With many tensors this takes seconds. `check` is called now and then, and raises if nobody waits for the result.
    """
    most = most // _ALIGN * _ALIGN
    if not most:
        raise LocalProtocolError(f"a parcel has {_ALIGN} bytes at least")
    itemsizes = tensors.itemsizes.tolist()
    found, current, end = [], list[Placed](), 0
    for tensor, offset, shape in _watched(boxes, check):
        itemsize = itemsizes[tensor]
        for origin, size in _cut(offset, shape, itemsize, most):
            nbytes = math.prod(size) * itemsize
            if current and end + nbytes > most:
                found.append(Parcel(end, tuple(current)))
                current, end = [], 0
            current.append(Placed(Box(tensor, origin, size), itemsize, end))
            end += -(-nbytes // _ALIGN) * _ALIGN
    if current:
        found.append(Parcel(end, tuple(current)))
    return found


def outgoing(
    parcels: Sequence[Parcel],
    exposures: Sequence[Exposure],
    tensors: TensorTable,
    check: Callable[[], object] = lambda: None,
) -> list[list[Staged]]:
    """List, for each parcel, the copies that fill it from what the trainer's ranks expose, ranks in turn.

    Bases count the parts of all ranks, one rank after the other. Raises `LocalProtocolError` naming the first tensor
    with needed elements that no rank exposes.
    """
    wanted = (
        Wanted(*box, itemsize, at, begin, packed_strides(box.shape, itemsize))
        for at, parcel in enumerate(parcels)
        for box, itemsize, begin in parcel.boxes
    )
    by_parcel: list[list[Draw]] = [[] for _ in parcels]
    for draw in draws(_watched(wanted, check), exposures, tensors):
        by_parcel[draw.target].append(draw)
    firsts = [0, *accumulate(map(len, exposures))]
    return [
        [
            Staged(
                draw.at,
                draw.strides,
                firsts[draw.rank] + draw.part,
                draw.source,
                draw.source_strides,
                draw.shape,
                draw.itemsize,
            )
            for draw in interleaved(several)
        ]
        for several in by_parcel
    ]


def incoming(
    parcels: Sequence[Parcel],
    places: Sequence[Exposure],
    tensors: TensorTable,
    check: Callable[[], object] = lambda: None,
) -> list[list[Staged]]:
    """List, for each parcel, the copies that empty it into the places of these ranks.

    The ranks may have room for only some of it. Bases count the regions of all ranks, one rank after the other.
    """
    every = [(at, placed) for at, parcel in enumerate(parcels) for placed in parcel.boxes]
    parts = [Part(*box, at, begin, packed_strides(box.shape, size)) for at, (box, size, begin) in every]
    travelling = Exposure.of(0, "", [], parts, tensors.width)
    found: list[list[Staged]] = [[] for _ in parcels]
    for draw in draws(_watched(_wanted(places, tensors), check), [travelling], tensors, all_of_it=False):
        at, placed = every[draw.part]
        begin = placed.begin + draw.source
        staged = Staged(begin, draw.source_strides, draw.target, draw.at, draw.strides, draw.shape, draw.itemsize)
        found[at].append(staged)
    return found


def _wanted(places: Sequence[Exposure], tensors: TensorTable) -> Iterator[Wanted]:
    first = 0
    for one in places:
        itemsizes = tensors.itemsizes[one.tensor].tolist()
        for part, itemsize in zip(one.parts(tensors), itemsizes, strict=True):
            yield Wanted(part.tensor, part.offset, part.shape, itemsize, first + part.region, part.at, part.strides)
        first += len(one.regions)


def _watched(each: Iterable[T], check: Callable[[], object]) -> Iterator[T]:
    for number, one in enumerate(each):
        if number % _OFTEN == 0:
            check()
        yield one


def _cut(
    offset: tuple[int, ...], shape: tuple[int, ...], itemsize: int, most: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes of at most `most` bytes, along its outermost dimensions."""
    nbytes = math.prod(shape) * itemsize
    if nbytes <= most:
        yield offset, shape
        return
    dim = next(at for at, length in enumerate(shape) if length > 1)
    rows = max(1, most // (nbytes // shape[dim]))
    for first in range(0, shape[dim], rows):
        origin = (*offset[:dim], offset[dim] + first, *offset[dim + 1 :])
        size = (*shape[:dim], min(rows, shape[dim] - first), *shape[dim + 1 :])
        yield from _cut(origin, size, itemsize, most)
