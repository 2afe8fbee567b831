"""Weights that are sent in another element type than they are held in, such as float32 masters as bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from weightsync.errors import SourceError
from weightsync.plan.dtypes import BY_NAME
from weightsync.plan.manifest import Layout, TensorTable
from weightsync.plan.table import check_local_table
from weightsync.sources.description import narrowed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from weightsync.sources.base import Source

__all__ = ["ConvertedSource", "converted"]

_SCRATCH = 1 << 22  # bytes read at a time of weights that lie in no tensor
# One byte holds no weight without a scale: tensors of such types stay as they are, and none is converted to one.
_FLOATING = tuple(name for name, dtype in BY_NAME.items() if "float" in name and dtype.itemsize > 1)


def converted(source: Source, dtype: Any) -> Source:
    """Return `source` with its floating-point tensors of two bytes and more as `dtype`: a torch.dtype, or its name.

    Returns the source itself if `dtype` is None or changes nothing. Raises `SourceError` for any other dtype.
    """
    if dtype is None:
        return source
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str | torch.dtype) or name not in _FLOATING:
        raise SourceError(
            f"dtype = {dtype!r} is nothing that weights can be converted to", hint=f"one of {', '.join(_FLOATING)}"
        )
    layout = _layout_as(source.layout(), name)
    return source if layout is source.layout() else ConvertedSource(source, layout)


class ConvertedSource:
    """A source in the element types of another layout of the same shards: boxes are converted as they are read."""

    def __init__(self, source: Source, layout: Layout) -> None:
        self._source = source
        self._layout = layout
        self._held = source.layout().tensors.dtypes

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together, as sent."""
        return self._layout.nbytes

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of all tensors, if the source knows them."""
        return getattr(self._source, "names", None)

    def layout(self) -> Layout:
        """What this rank holds, in the types that are sent."""
        return self._layout

    def local(self, shard: int) -> torch.Tensor | None:
        """A shard's own memory, not converted."""
        return self._source.local(shard)

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """The bytes of a box as the source gives them; None for a box that is converted."""
        held, sent = self._dtypes(shard)
        return self._source.box_bytes(shard, src_offset, shape) if held == sent else None

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box of a shard into `out`, rounded to its type."""
        held, sent = self._dtypes(shard)
        if held == sent:
            self._source.read_into(shard, src_offset, shape, out)
            return
        if tuple(out.shape) != shape or out.dtype != sent:
            raise ValueError(f"a box of {sent} {shape} does not go into {out.dtype} {tuple(out.shape)}")
        local = self._source.local(shard)
        if local is None:
            self._read(shard, src_offset, out, held)
        else:
            out.copy_(narrowed(local.detach(), src_offset, shape))

    def _dtypes(self, shard: int) -> tuple[torch.dtype, torch.dtype]:
        """Return the types in which a shard is held and sent."""
        tensor = int(self._layout.tensor[shard])
        return getattr(torch, self._held[tensor]), getattr(torch, self._layout.tensors.dtypes[tensor])

    def _read(self, shard: int, offset: tuple[int, ...], out: torch.Tensor, held: torch.dtype) -> None:
        if out.numel() * held.itemsize > _SCRATCH:
            dim = next(d for d, length in enumerate(out.shape) if length > 1)
            half = out.shape[dim] // 2
            behind = (*offset[:dim], offset[dim] + half, *offset[dim + 1 :])
            self._read(shard, offset, out.narrow(dim, 0, half), held)
            self._read(shard, behind, out.narrow(dim, half, out.shape[dim] - half), held)
        else:
            scratch = torch.empty(out.shape, dtype=held, device=out.device)
            self._source.read_into(shard, offset, tuple(out.shape), scratch)
            out.copy_(scratch)


# Every push should use the same layout object, because a layout is packed once and then keeps its digest.
_LAYOUTS: WeakKeyDictionary[Layout, dict[str, Layout]] = WeakKeyDictionary()


def _layout_as(layout: Layout, dtype: str) -> Layout:
    """Return this layout with its floating-point tensors as `dtype`; the layout itself if they are so already."""
    known = _LAYOUTS.setdefault(layout, {})
    if dtype not in known:
        table = layout.tensors
        dtypes = tuple([dtype if name in _FLOATING else name for name in table.dtypes])
        if dtypes == table.dtypes:
            return layout
        other = TensorTable(table.names, dtypes, table.shapes, table.aliases)
        check_local_table(other)
        known[dtype] = Layout(other, layout.tensor, layout.offset, layout.shape)
    return known[dtype]
