"""Remembers how shards are cut from parameters, so that the next push need not ask the rules. Holds no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["Cut"]


@dataclass(frozen=True)
class Cut:
    """How views were cut from one packed tensor, so that they can be cut from it again, or from another."""

    rows: tuple[int, ...] = ()  # lengths of runs of rows, from row 0 on: one for each view, then the rest
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...] = ()  # otherwise: shape, strides, offset of views
    whole: bool = False  # the tensor itself is the only view

    @classmethod
    def of(cls, tensor: torch.Tensor, views: Sequence[torch.Tensor]) -> Cut | None:
        """Return how `views` are cut from `tensor`; None if one is no view of it, or `tensor` itself is not packed."""
        if not tensor.is_contiguous():
            return None
        if not views:
            return cls()
        memory = tensor.untyped_storage().data_ptr()
        boxes = []
        for view in views:
            shape, strides = tuple(view.shape), view.stride()
            offset = int(view.storage_offset() - tensor.storage_offset())
            last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            inside = 0 in shape or 0 <= offset <= last < tensor.numel()
            if view.untyped_storage().data_ptr() != memory or view.dtype != tensor.dtype or not inside:
                return None
            boxes.append((shape, strides, offset))
        if boxes == [(tuple(tensor.shape), tensor.stride(), 0)]:
            return cls(whole=True)
        step, at = tensor.stride(0) if tensor.dim() else 0, 0
        for shape, strides, offset in boxes:
            if shape[1:] != tensor.shape[1:] or strides != tensor.stride() or offset != at * step:
                return cls(boxes=tuple(boxes))
            at += shape[0]
        return cls(rows=(*(shape[0] for shape, _, _ in boxes), tensor.shape[0] - at))

    def views(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Cut the same views from a packed tensor of the same shape."""
        if self.whole:
            return (tensor,)
        if self.rows:
            return tensor.split_with_sizes(self.rows)[:-1]
        begin = tensor.storage_offset()
        return [tensor.as_strided(shape, strides, begin + offset) for shape, strides, offset in self.boxes]
