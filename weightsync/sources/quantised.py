"""Weights that are quantised to float8 with scales on their way into slots, as an fp8 checkpoint would have them.

Names and shapes determine which tensors are quantised, and where their scales go. Values are read twice: once when a
push begins, for the greatest magnitude of each block, and once box by box as slots need them. Only scales are kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from weightsync.errors import SourceError
from weightsync.plan.manifest import Layout, Shard
from weightsync.sources.amax import reduce_amax
from weightsync.sources.blocks import amax_into, quantise_into, rows_at_a_time, scales_of
from weightsync.sources.description import narrowed
from weightsync.sources.fp8 import Fp8

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    from weightsync.plan.boxes import Ints
    from weightsync.sources.base import Source
    from weightsync.sources.grid import Grid

__all__ = ["QuantisedSource", "quantised"]

_QUANTISED = torch.float8_e4m3fn
_FROM = ("bfloat16", "float16", "float32")
_Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def quantised(source: Source, recipe: Fp8 | str | os.PathLike[str] | None, group: Any = None) -> Source:
    """Return `source` quantised by `recipe`; `source` itself if `recipe` is None.

    `recipe` is an `Fp8`, or the directory of a checkpoint to follow. `group` is the torch.distributed group of the
    ranks that push. Raises `SourceError` if the recipe does not say what becomes of a tensor, or makes float8 of none.
    """
    if recipe is None:
        return source
    if isinstance(recipe, str | os.PathLike):
        recipe = Fp8.like(recipe)
    if not isinstance(recipe, Fp8):
        raise SourceError(
            f"quantise = {recipe!r} says nothing about how",
            hint="the directory of the fp8 checkpoint that engines serve, or weightsync.sources.Fp8(…)",
        )
    return QuantisedSource(source, recipe, group)


class QuantisedSource:
    """A source whose weights are quantised as they are read.

    Call `measure` first, once, when the weights have the values to be pushed. The weights must not change until they
    have been read.
    """

    def __init__(self, source: Source, recipe: Fp8, group: Any = None) -> None:
        """Raises `SourceError` as `quantised` does."""
        self._source, self._recipe, self._group = source, recipe, group
        self._cut = _cut(source.layout(), recipe)
        every = getattr(source, "names", None)  # None: other ranks may have other tensors
        if not self._cut.grids and every and _has_all(source.layout(), every):
            raise SourceError(
                f"quantise makes float8 of none of the {len(every)} tensors",
                hint=f"they are {every[0]!r} and others; leave `quantise` out for those that stay as they are",
            )
        self._scales: dict[int, torch.Tensor] = {}  # by tensor of the source: the scales of all its blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together, as sent."""
        return self._cut.layout.nbytes

    def layout(self) -> Layout:
        """What this rank holds, as it is sent: the source's shards, then those of scales."""
        return self._cut.layout

    def local(self, shard: int) -> torch.Tensor | None:
        """A shard's own memory; None for a shard that is computed."""
        return self._source.local(shard) if self._as_is(shard) else None

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """The bytes of a box as the source gives them; None for a shard that is computed."""
        return self._source.box_bytes(shard, src_offset, shape) if self._as_is(shard) else None

    def measure(self) -> None:
        """Work out all scales from the weights' values of this moment. With `all_reduce`, this is a collective.

        Raises `SourceError` for a NaN or an infinity in weights that are quantised and, without `all_reduce`, for
        blocks that other ranks have a part of. Errors of reading the weights are raised as they are; with `all_reduce`,
        the other ranks then raise `PushAborted`, which names this rank and the reason.
        """
        cut, layout = self._cut, self._source.layout()
        names = layout.tensors.names
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        reduces = self._recipe.all_reduce and distributed
        if cut.shared and not reduces:
            raise _shared(names[cut.shared[0]], cut.grids[cut.shared[0]], len(cut.shared))
        gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
        with torch.no_grad():
            failure: Exception | None = None
            try:
                amax = self._amax(device)
            except Exception as error:
                if not reduces:
                    raise
                amax, failure = {}, error  # raised in the collective, where the other ranks wait for this one
            if reduces:
                of_shared = {names[tensor] for tensor in cut.shared}
                reduce_amax({names[tensor]: most for tensor, most in amax.items()}, of_shared, self._group, failure)
            _check_finite({names[tensor]: most for tensor, most in amax.items()})
            self._scales = {
                tensor: scales_of(most, cut.grids[tensor], ue8m0=self._recipe.ue8m0) for tensor, most in amax.items()
            }

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Write a box into `out`: scales, or weights quantised on the GPU of `out`, else where the weights lie."""
        if self._as_is(shard):
            self._source.read_into(shard, src_offset, shape, out)
            return
        cut = self._cut
        is_scale = shard >= len(cut.tensor)
        if tuple(out.shape) != shape or out.dtype != (torch.float32 if is_scale else _QUANTISED):
            raise ValueError(f"a box of {shape} that is quantised does not go into {out.dtype} {tuple(out.shape)}")
        tensor = cut.scale_of[shard - len(cut.tensor)] if is_scale else cut.tensor[shard]
        if not out.numel():
            return
        scales = self._scales.get(tensor)
        if scales is None:
            raise SourceError("weights that are quantised were read before `measure` had their scales")
        grid = cut.grids[tensor]
        offset, _ = cut.box(shard)
        with torch.no_grad():
            if is_scale:
                out.copy_(narrowed(scales.view(grid.scale_shape), _plus(offset, src_offset), shape))
                return
            for at, box in self._boxes(shard, src_offset, shape, out.device):
                inside = tuple([a - b for a, b in zip(at, src_offset, strict=True)])
                into = narrowed(out, inside, tuple(box.shape))
                quantise_into(into, box, _plus(offset, at), grid, scales, cut.sent[tensor])

    def _amax(self, device: torch.device) -> dict[int, torch.Tensor]:
        """Return, by tensor, the greatest magnitudes in this rank's parts of its blocks."""
        cut = self._cut
        amax: dict[int, torch.Tensor] = {}
        for shard, tensor in cut.measured:
            offset, shape = cut.box(shard)
            for at, box in self._boxes(shard, (0,) * len(shape), shape, device):
                grid = cut.grids[tensor]
                if tensor not in amax:
                    amax[tensor] = torch.zeros(grid.shape, dtype=torch.float32, device=box.device)
                amax_into(amax[tensor], box, _plus(offset, at), grid, cut.sent[tensor])
        return amax

    def _as_is(self, shard: int) -> bool:
        cut = self._cut
        return shard < len(cut.tensor) and cut.tensor[shard] not in cut.grids

    def _boxes(
        self, shard: int, offset: tuple[int, ...], shape: tuple[int, ...], device: torch.device
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """Yield a box of a shard where it lies, with its offset. If it lies in no tensor, read some rows at a time."""
        local = self._source.local(shard)
        if local is not None:
            yield offset, narrowed(local.detach(), offset, shape)
            return
        sent, step = self._cut.sent[self._cut.tensor[shard]], rows_at_a_time(shape)
        for row in range(0, shape[-2], step):
            at = (*offset[:-2], offset[-2] + row, offset[-1])
            box = torch.empty((*shape[:-2], min(step, shape[-2] - row), shape[-1]), dtype=sent, device=device)
            self._source.read_into(shard, at, tuple(box.shape), box)
            yield at, box


@dataclass(frozen=True, eq=False)
class _Cut:
    """The layout that is sent: the source's shards, then those of scales. Tensors are numbered as in the source."""

    layout: Layout
    tensor: list[int]  # by shard of the source: its tensor
    grids: dict[int, Grid]  # by quantised tensor
    sent: dict[int, torch.dtype]  # by quantised tensor: its type before it is quantised
    scale_of: list[int]  # by shard of scales: the tensor that they scale
    shared: list[int]  # tensors of which this rank has part of a block
    offsets: list[list[int]]  # by shard of `layout`
    shapes: list[list[int]]  # by shard of `layout`

    @property
    def measured(self) -> Iterator[tuple[int, int]]:
        """Shards that are quantised and not empty, with their tensors."""
        for shard, tensor in enumerate(self.tensor):
            if tensor in self.grids and 0 not in self.box(shard)[1]:
                yield shard, tensor

    def box(self, shard: int) -> _Box:
        """A shard's offset and shape."""
        ndim = len(self.layout.tensors.shapes[int(self.layout.tensor[shard])])
        return tuple(self.offsets[shard][:ndim]), tuple(self.shapes[shard][:ndim])


# As for other conversions, every push should use the same layout object.
_CUTS: WeakKeyDictionary[Layout, dict[Fp8, _Cut]] = WeakKeyDictionary()


def _cut(layout: Layout, recipe: Fp8) -> _Cut:
    known = _CUTS.setdefault(layout, {})
    if recipe not in known:
        known[recipe] = _made(layout, recipe)
    return known[recipe]


def _made(layout: Layout, recipe: Fp8) -> _Cut:
    table = layout.tensors
    ties: dict[str, list[str]] = {}
    for other, name in table.aliases:
        ties.setdefault(name, []).append(other)
    grids: dict[int, Grid] = {}
    for i, (name, dtype, shape) in enumerate(zip(table.names, table.dtypes, table.shapes, strict=True)):
        if dtype not in (*_FROM, "float64") or not recipe.quantises((name, *ties.get(name, ())), shape):
            continue
        if dtype not in _FROM:
            raise SourceError(f"tensor {name!r} is {dtype}, and is not quantised", hint='give dtype="bfloat16" as well')
        grids[i] = recipe.grid(shape)
    shards: list[Shard] = []
    scales: list[Shard] = []
    scale_of: list[int] = []
    boxes: dict[int, list[_Box]] = {}
    tensor = layout.tensor.tolist()
    for i, at in enumerate(tensor):
        shard = layout.shard(i)
        grid = grids.get(at)
        if grid is None:
            shards.append(shard)
            continue
        shards.append(Shard(shard.name, "float8_e4m3fn", shard.global_shape, shard.offset, shard.shape))
        corners = grid.corners(shard.offset, shard.shape)
        if corners is not None:
            scales.append(Shard(recipe.scale_of(shard.name), "float32", grid.scale_shape, *corners))
            scale_of.append(at)
        boxes.setdefault(at, []).append((shard.offset, shard.shape))
    aliases = [*table.aliases]
    scaled = {scale.name for scale in scales}
    aliases += [
        (recipe.scale_of(other), recipe.scale_of(name))
        for other, name in table.aliases
        if recipe.scale_of(name) in scaled
    ]
    made = Layout.of([*shards, *scales], aliases)
    return _Cut(
        layout=made,
        tensor=tensor,
        grids=grids,
        sent={i: getattr(torch, table.dtypes[i]) for i in grids},
        scale_of=scale_of,
        shared=[i for i, held in boxes.items() if not grids[i].whole(held)],
        offsets=_rows(made.offset),
        shapes=_rows(made.shape),
    )


def _has_all(layout: Layout, names: tuple[str, ...]) -> bool:
    """Whether a rank has something of each name. With FSDP1, it also knows names that only other ranks have."""
    return {*layout.tensors.names, *dict(layout.tensors.aliases)}.issuperset(names)


def _plus(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([a + b for a, b in zip(one, other, strict=True)])


def _rows(of: Ints) -> list[list[int]]:
    found: list[list[int]] = of.tolist()
    return found


def _check_finite(amax: dict[str, torch.Tensor]) -> None:
    """Raise `SourceError` naming a tensor with a magnitude that is not finite. Waits for the GPUs with `amax`."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for most in amax.values():
        by_device.setdefault(most.device, []).append(most.flatten())
    if all(bool(torch.cat(some).isfinite().all()) for some in by_device.values()):
        return
    name, most = next((name, most) for name, most in amax.items() if not most.isfinite().all())
    block = [int(at) for at in (~most.isfinite()).nonzero()[0]]
    raise SourceError(
        f"tensor {name!r} has a NaN or an infinity, in block {block}: float8 has no scale for it",
        hint="look at the step before: engines would serve it as numbers",
    )


def _shared(name: str, grid: Grid, count: int) -> SourceError:
    if grid.one:
        what = "other ranks have parts of it, and it has one scale"
    else:
        what = f"blocks of {grid.height} x {grid.width} that share a scale lie on several ranks"
    more = f" (and {count - 1} more tensors)" if count > 1 else ""
    return SourceError(
        f"tensor {name!r} cannot be quantised by this rank alone: {what}{more}",
        hint="give Fp8(…, all_reduce=True), or Fp8.like(…, all_reduce=True), on all ranks: a small collective at the "
        "beginning of each push; or cut the weights where blocks end",
    )
