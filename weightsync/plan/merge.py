"""Merges the layouts of all ranks: one table of tensors in canonical order, and which rank holds which box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import PushRefused
from weightsync.plan.boxes import Ints, padded_width
from weightsync.plan.fused import canonical_order, natural_key
from weightsync.plan.manifest import MAX_TENSORS, MAX_TOTAL_BYTES, Layout, TensorTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["Holdings", "merge_layouts"]


@dataclass(frozen=True)
class Holdings:
    """The non-empty shards of all ranks, rank by rank in the order of their layouts."""

    tensors: TensorTable  # canonical order
    group_first: Ints  # [g] tensor at which each fused group begins
    rank: npt.NDArray[np.int32]  # [n]
    shard: npt.NDArray[np.int32]  # [n] index in the rank's layout
    tensor: npt.NDArray[np.int32]  # [n] index into `tensors`
    offset: Ints  # [n, width]
    shape: Ints  # [n, width]


def merge_layouts(layouts: Sequence[Layout]) -> Holdings:
    """Merge the layouts of all ranks.

    Raises `PushRefused` naming the first tensor (in natural order) about which two ranks disagree.
    """
    table, maps, begins = _union(layouts)
    shards, tensors, offsets, shapes = [], [], [], []
    for layout, to_union in zip(layouts, maps, strict=True):
        held = np.flatnonzero((layout.shape > 0).all(axis=1))
        shards.append(held.astype(np.int32))
        tensors.append(to_union[layout.tensor[held]])
        # Columns beyond the merged width belong to no tensor and hold their neutral values.
        offsets.append(padded_width(layout.offset[held], table.width, 0)[:, : table.width])
        shapes.append(padded_width(layout.shape[held], table.width, 1)[:, : table.width])
    rank = np.repeat(np.arange(len(layouts), dtype=np.int32), [len(some) for some in shards])
    return Holdings(
        tensors=table,
        group_first=begins,
        rank=rank,
        shard=np.concatenate(shards),
        tensor=np.concatenate(tensors),
        offset=np.concatenate(offsets),
        shape=np.concatenate(shapes),
    )


def _union(layouts: Sequence[Layout]) -> tuple[TensorTable, list[npt.NDArray[np.int32]], Ints]:
    """Return the merged table, the positions in it of each layout's tensors, and where fused groups begin."""
    first_rank: dict[bytes, int] = {}  # by the table's digest
    index: dict[str, int] = {}
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    owners: list[int] = []  # the first rank that listed the tensor
    positions: dict[bytes, npt.NDArray[np.int32]] = {}
    conflicts: list[tuple[str, int, int]] = []
    for rank, layout in enumerate(layouts):
        table = layout.tensors
        if table.digest in positions:
            continue
        first_rank[table.digest] = rank
        if not index:  # the first table is usually the only one
            index, dtypes, shapes = dict(table.index), list(table.dtypes), list(table.shapes)
            owners = [rank] * len(index)
            positions[table.digest] = np.arange(len(index), dtype=np.int32)
            continue
        known = len(index)
        places = [index.setdefault(name, len(index)) for name in table.names]
        positions[table.digest] = np.array(places, dtype=np.int32)
        for place, name, dtype, shape in zip(places, table.names, table.dtypes, table.shapes, strict=True):
            if place >= known:
                dtypes.append(dtype)
                shapes.append(shape)
            elif dtypes[place] != dtype or shapes[place] != shape:
                conflicts.append((name, owners[place], rank))
        owners.extend([rank] * (len(index) - known))
    if conflicts:
        name, one, other = min(conflicts, key=lambda conflict: natural_key(conflict[0]))
        raise PushRefused(
            f"tensor {name!r} is {_described(layouts[one], name)} on rank {one} and "
            f"{_described(layouts[other], name)} on rank {other}",
            rank=other,
            hint="every rank must describe the same tensors: checkpoint names, dtypes and global (unsharded) shapes",
        )
    if len(index) > MAX_TENSORS:
        raise PushRefused(f"all ranks together have {len(index)} tensors, more than {MAX_TENSORS}")
    aliases = _aliases(layouts, first_rank)
    hidden = [name for name in aliases if name in index]
    if hidden:
        _check_hidden(layouts, hidden, aliases)
    names = [name for name in index if name not in aliases] if hidden else list(index)
    order, begins = canonical_order(names)
    base = layouts[0].tensors
    if len(base) != len(index) or hidden:
        kept = [index[name] for name in names]
        base = TensorTable(tuple(names), tuple(dtypes[i] for i in kept), tuple(shapes[i] for i in kept))
    pairs = tuple((other, aliases[other][0]) for other in sorted(aliases, key=natural_key))
    merged = base.reordered(order, pairs)
    if int(merged.sizes.astype(np.float64).sum()) > MAX_TOTAL_BYTES:
        raise PushRefused("the sizes of all tensors together do not fit in 64 bits")
    place_of = np.full(len(index), -1, dtype=np.int32)
    at = np.fromiter((index[name] for name in names), np.int64, len(names)) if hidden else np.arange(len(names))
    place_of[at[order]] = np.arange(len(names), dtype=np.int32)
    moved = {digest: place_of[places] for digest, places in positions.items()}
    return merged, [moved[layout.tensors.digest] for layout in layouts], begins


_TIED_HINT = (
    "list tied parameters in the same order on every rank: the first name is sent, the others become its aliases"
)


def _aliases(layouts: Sequence[Layout], first_rank: dict[bytes, int]) -> dict[str, tuple[str, int]]:
    """Merge every rank's aliases: for each, the name that it stands for, and the first rank that says so."""
    merged: dict[str, tuple[str, int]] = {}
    for rank in first_rank.values():
        for other, name in layouts[rank].tensors.aliases:
            seen, seen_rank = merged.setdefault(other, (name, rank))
            if seen != name:
                raise PushRefused(
                    f"tensor {other!r} is tied to {seen!r} on rank {seen_rank} and to {name!r} on rank {rank}",
                    rank=rank,
                    hint=_TIED_HINT,
                )
    return merged


def _check_hidden(layouts: Sequence[Layout], names: list[str], aliases: dict[str, tuple[str, int]]) -> None:
    """Raise `PushRefused` if a rank holds bytes of a tensor that is an alias on another rank.

    A rank that holds no byte of tied tensors cannot always see that they are tied, and may list them apart. The alias
    then stands.
    """
    for name in sorted(names, key=natural_key):
        tied, alias_rank = aliases[name]
        for rank, layout in enumerate(layouts):
            at = layout.tensors.index.get(name)
            if at is not None and (layout.shape[layout.tensor == at] > 0).all(axis=1).any():
                raise PushRefused(
                    f"tensor {name!r} is tied to {tied!r} on rank {alias_rank} and a tensor of its own on rank {rank}",
                    rank=rank,
                    hint=_TIED_HINT,
                )


def _described(layout: Layout, name: str) -> str:
    at = layout.tensors.index[name]
    return f"{layout.tensors.dtypes[at]} {layout.tensors.shapes[at]}"
