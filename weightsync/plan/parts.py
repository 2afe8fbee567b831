"""The parts that one rank writes: its shards, cut at the edges of pieces."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from weightsync.errors import RemoteProtocolError
from weightsync.plan.boxes import Ints, as_tuples, padded_width, row_strides

if TYPE_CHECKING:
    import numpy.typing as npt

    from weightsync.plan.manifest import Layout, Manifest

__all__ = ["Overlaps", "Part", "overlaps", "parts_by_bucket"]


class Part(NamedTuple):
    """The box `shape` at `src_offset` in the local shard goes to `dst_offset` in the piece's box; all in elements.

    In the global tensor the box lies at the shard's offset plus `src_offset`.
    """

    shard: int  # index in the rank's layout
    piece: int  # index in the manifest
    src_offset: tuple[int, ...]
    shape: tuple[int, ...]
    dst_offset: tuple[int, ...]


class Overlaps(NamedTuple):
    """Where boxes meet pieces: row `box` of the boxes meets `piece` in the box `shape` at `offset` of the tensor."""

    box: Ints  # [m]
    piece: Ints  # [m]
    offset: Ints  # [m, width]
    shape: Ints  # [m, width]


def overlaps(manifest: Manifest, tensor: npt.NDArray[np.int32], offset: Ints, shape: Ints) -> Overlaps:
    """Intersect these non-empty boxes [n, width] of the manifest's tensors with its pieces; in the order of boxes."""
    table = manifest.tensors
    # If all elements of all tensors are numbered in one line, pieces ascend along it. So a box can only meet the pieces
    # from that of its first element to that of its last.
    line = np.cumsum(table.numels) - table.numels
    pieces = line[manifest.piece_tensor] + manifest.piece_start
    strides = row_strides(table.dims)[tensor]
    low = line[tensor] + (offset * strides).sum(axis=1)
    high = line[tensor] + ((offset + shape - 1) * strides).sum(axis=1)
    first = np.searchsorted(pieces, low, side="right") - 1
    several = np.searchsorted(pieces, high, side="right") - first
    box = np.repeat(np.arange(len(tensor), dtype=np.int64), several)
    piece = np.arange(len(box), dtype=np.int64) + np.repeat(first - (np.cumsum(several) - several), several)
    piece_offset, piece_shape = manifest.piece_boxes
    start = np.maximum(offset[box], piece_offset[piece])
    end = np.minimum((offset + shape)[box], (piece_offset + piece_shape)[piece])
    meets = (end > start).all(axis=1)
    return Overlaps(box[meets], piece[meets], start[meets], (end - start)[meets])


def parts_by_bucket(manifest: Manifest, layout: Layout, fills: npt.NDArray[np.int32]) -> tuple[tuple[Part, ...], ...]:
    """List, for each bucket, the parts that the rank of `layout` writes, in order of piece and shard.

    `fills` are the shards that this rank writes, as in `Plan.fills`. The result depends on the arguments alone. Raises
    `RemoteProtocolError` if manifest or fills do not belong to this layout: both may have come over the wire.
    """
    if len(fills) and (int(fills.min()) < 0 or int(fills.max()) >= len(layout)):
        raise RemoteProtocolError(f"a plan fills from shards that this rank, which holds {len(layout)}, does not have")
    width = manifest.tensors.width
    fills = fills[(layout.shape[fills] > 0).all(axis=1)]
    tensor = _places(manifest, layout, fills)
    offset = padded_width(layout.offset[fills], width, 0)[:, :width]
    shape = padded_width(layout.shape[fills], width, 1)[:, :width]
    met = overlaps(manifest, tensor, offset, shape)
    order = np.lexsort((fills[met.box], met.piece))
    box, piece, start = met.box[order], met.piece[order], met.offset[order]
    ndims = manifest.tensors.ndims[manifest.piece_tensor[piece]]
    columns = zip(
        fills[box].tolist(),
        piece.tolist(),
        as_tuples(start - offset[box], ndims),
        as_tuples(met.shape[order], ndims),
        as_tuples(start - manifest.piece_boxes[0][piece], ndims),
        strict=True,
    )
    parts = list(map(Part._make, columns))
    bounds = np.searchsorted(piece, manifest.bucket_first).tolist()
    return tuple(tuple(parts[a:b]) for a, b in pairwise(bounds))


def _places(manifest: Manifest, layout: Layout, fills: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return, for each of these shards, the index of its tensor in the manifest."""
    table, own = manifest.tensors, layout.tensors
    places = np.zeros(len(own), dtype=np.int32)
    # Only tensors with shards to fill: if this rank holds no byte of a tensor, and another rank lists it as an alias,
    # the manifest lacks it.
    for i in np.unique(layout.tensor[fills]).tolist():
        at = table.index.get(own.names[i])
        if at is None or table.dtypes[at] != own.dtypes[i] or table.shapes[at] != own.shapes[i]:
            raise RemoteProtocolError(
                f"a plan does not have tensor {own.names[i]!r}, {own.dtypes[i]} {own.shapes[i]}, as this rank holds it"
            )
        places[i] = at
    return places[layout.tensor[fills]]
