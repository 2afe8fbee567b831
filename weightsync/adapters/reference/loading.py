"""Plan what one rank copies out of each bucket of a manifest, and which boxes it then holds. Pure geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightsync.adapters.reference.admission import held_names
from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.reference.config import ModelConfig
    from weightsync.adapters.reference.sharding import RankLayout, Slice
    from weightsync.plan.manifest import Manifest

__all__ = ["LoadedShard", "LoadingPlan", "SlotBox", "plan_loading", "wanted"]


class LoadedShard(NamedTuple):
    """A box of a pushed tensor, and its place in one of this rank's parameters. `at` and `strides` are in bytes."""

    tensor: int  # index in the manifest
    offset: tuple[int, ...]  # of the box in the tensor, in elements
    shape: tuple[int, ...]
    itemsize: int
    param: str
    at: int
    strides: tuple[int, ...]


class SlotBox(NamedTuple):
    """A box in a bucket: where it goes, and where it lies in the slot, in bytes."""

    held: LoadedShard
    at: int
    strides: tuple[int, ...]


class LoadingPlan(NamedTuple):
    """Everything that one rank does with the buckets of one manifest."""

    manifest: Manifest
    copies: tuple[tuple[SlotBox, ...], ...]  # per bucket
    residents: tuple[LoadedShard, ...]  # the boxes of the manifest's tensors that the rank holds in the end


def plan_loading(config: ModelConfig, layout: RankLayout, manifest: Manifest) -> LoadingPlan:
    """Plan the loading of an admitted manifest by the rank that holds `layout`."""
    names = held_names(config, manifest)
    slices = [layout.slices.get(names[name], ()) for name in manifest.tensors.names]
    itemsizes = manifest.tensors.itemsizes.tolist()
    offsets, shapes = (column.tolist() for column in manifest.piece_boxes)
    starts = manifest.piece_offset.tolist()
    copies: list[list[SlotBox]] = [[] for _ in range(manifest.buckets)]
    for bucket, here in enumerate(copies):
        for piece in manifest.bucket_pieces(bucket):
            tensor = int(manifest.piece_tensor[piece])
            ndim, itemsize = len(manifest.tensors.shapes[tensor]), itemsizes[tensor]
            low, size = offsets[piece][:ndim], shapes[piece][:ndim]
            strides = packed_strides(size, itemsize)
            for one in slices[tensor]:
                held = _part(layout, tensor, itemsize, one, low, size)
                if held is not None:
                    at = starts[piece] + _inner(held.offset, low, strides)
                    here.append(SlotBox(held, at, strides))
    residents = [
        _part(layout, tensor, itemsizes[tensor], one, one.offset, one.shape)
        for tensor, several in enumerate(slices)
        for one in several
    ]
    return LoadingPlan(manifest, tuple(map(tuple, copies)), tuple(held for held in residents if held is not None))


def wanted(plan: LoadingPlan, targets: Sequence[str]) -> tuple[Wanted, ...]:
    """Return the boxes that this rank draws out of a trainer's memory, with parameters numbered as in `targets`."""
    index = {name: at for at, name in enumerate(targets)}
    return tuple(
        Wanted(held.tensor, held.offset, held.shape, held.itemsize, index[held.param], held.at, held.strides)
        for held in plan.residents
    )


def _part(
    layout: RankLayout, tensor: int, itemsize: int, one: Slice, offset: Sequence[int], shape: Sequence[int]
) -> LoadedShard | None:
    """Cut a slice to the box `shape` at `offset` of its tensor; None if nothing of it lies there."""
    low = tuple(map(max, one.offset, offset))
    high = [min(a + n, b + m) for a, n, b, m in zip(one.offset, one.shape, offset, shape, strict=True)]
    size = tuple(end - first for first, end in zip(low, high, strict=True))
    if any(n <= 0 for n in size):
        return None
    strides = packed_strides(layout.params[one.param], itemsize)
    stacked = len(strides) - len(size)
    at = sum(index * step for index, step in zip(one.at, strides, strict=True))
    at += _inner(low, one.offset, strides[stacked:])
    return LoadedShard(tensor, low, size, itemsize, one.param, at, strides[stacked:])


def _inner(offset: Sequence[int], origin: Sequence[int], strides: Sequence[int]) -> int:
    return sum((at - first) * step for at, first, step in zip(offset, origin, strides, strict=True))
