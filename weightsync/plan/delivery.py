"""What goes from a trainer's memory to places in an engine of another node, and in which pieces. Pure.

Both ends work out the same pieces from what the engine has shown: which boxes of which tensors its ranks have places
for. A piece is a stretch of staging memory in which boxes lie one after the other, row by row. The sending end fills it
out of what the trainer's ranks expose, the other empties it into the engine's parameters.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from weightsync.errors import LocalProtocolError
from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Wanted, draws, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from weightsync.plan.draws import Draw
    from weightsync.plan.exposure import Exposure
    from weightsync.plan.table import TensorTable

__all__ = ["Piece", "Placed", "Staged", "incoming", "outgoing", "pieces_of"]

_ALIGN = 64  # bytes
_OFTEN = 1024  # boxes between two checks

T = TypeVar("T")


class Placed(NamedTuple):
    """A box of a tensor, where it lies in its piece, and the place it is for."""

    tensor: int  # of the manifest
    offset: tuple[int, ...]  # in the tensor, in elements
    shape: tuple[int, ...]
    itemsize: int
    begin: int  # byte of the piece
    region: int  # of all regions of the ranks, in their order
    at: int  # byte of that
    strides: tuple[int, ...]  # bytes


class Piece(NamedTuple):
    """Boxes that travel together."""

    nbytes: int
    boxes: tuple[Placed, ...]


class Staged(NamedTuple):
    """A copy between a piece in staging memory and memory that is mapped."""

    begin: int  # byte of the piece
    packed: tuple[int, ...]  # strides there, in bytes, as all are
    base: int  # which of what is mapped
    at: int  # byte of that
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    itemsize: int


def pieces_of(
    places: Sequence[Exposure],
    tensors: TensorTable,
    most: int,
    *,
    turn: int = 0,
    turns: int = 1,
    check: Callable[[], object] = lambda: None,
) -> list[Piece]:
    """What these ranks of an engine have places for, in pieces of at most `most` bytes (64 at least).

    Of `turns` that are delivered at a time each begins elsewhere in the model, so that trainers whose ranks have a part
    of the layers each send all the time. `check` is called now and then: all of this takes seconds where there are many
    tensors, and it raises when nobody waits any more.
    """
    most = most // _ALIGN * _ALIGN
    if not most:
        raise LocalProtocolError(f"a piece has {_ALIGN} bytes at least")
    boxes = sorted(_watched(_boxes(places, tensors, most), check), key=lambda box: box.tensor)
    first = len(boxes) * turn // turns
    found, current, end = [], list[Placed](), 0
    for box in boxes[first:] + boxes[:first]:
        nbytes = math.prod(box.shape) * box.itemsize
        if current and end + nbytes > most:
            found.append(Piece(end, tuple(current)))
            current, end = [], 0
        current.append(box._replace(begin=end))
        end += -(-nbytes // _ALIGN) * _ALIGN
    if current:
        found.append(Piece(end, tuple(current)))
    return found


def outgoing(
    pieces: Sequence[Piece],
    exposures: Sequence[Exposure],
    tensors: TensorTable,
    check: Callable[[], object] = lambda: None,
) -> list[list[Staged]]:
    """By piece, the copies that fill it out of what the trainer's ranks expose, ranks in turn; bases are the parts of
    all ranks, one after the other. Raises `LocalProtocolError` naming the first tensor of which something is needed
    that nobody exposes.
    """
    wanted = (
        Wanted(box.tensor, box.offset, box.shape, box.itemsize, at, box.begin, packed_strides(box.shape, box.itemsize))
        for at, piece in enumerate(pieces)
        for box in piece.boxes
    )
    by_piece: list[list[Draw]] = [[] for _ in pieces]
    for draw in draws(_watched(wanted, check), exposures, tensors):
        by_piece[draw.target].append(draw)
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
        for several in by_piece
    ]


def incoming(pieces: Sequence[Piece]) -> list[list[Staged]]:
    """By piece, the copies that empty it into the places; bases are the regions of all ranks, one after the other."""
    return [
        [
            Staged(
                box.begin,
                packed_strides(box.shape, box.itemsize),
                box.region,
                box.at,
                box.strides,
                box.shape,
                box.itemsize,
            )
            for box in piece.boxes
        ]
        for piece in pieces
    ]


def _watched(each: Iterable[T], check: Callable[[], object]) -> Iterator[T]:
    for number, one in enumerate(each):
        if number % _OFTEN == 0:
            check()
        yield one


def _boxes(places: Sequence[Exposure], tensors: TensorTable, most: int) -> Iterator[Placed]:
    first = 0
    for one in places:
        itemsizes = tensors.itemsizes[one.tensor].tolist()
        for part, itemsize in zip(one.parts(tensors), itemsizes, strict=True):
            for offset, shape in _cut(part.offset, part.shape, itemsize, most):
                steps = zip(offset, part.offset, part.strides, strict=True)
                at = part.at + sum((now - origin) * step for now, origin, step in steps)
                yield Placed(part.tensor, offset, shape, itemsize, 0, first + part.region, at, part.strides)
        first += len(one.regions)


def _cut(
    offset: tuple[int, ...], shape: tuple[int, ...], itemsize: int, most: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The box in boxes of at most `most` bytes, along its outermost dimensions."""
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
