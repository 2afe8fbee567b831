"""A bucket as a worker has read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from weightsync.plan.manifest import Manifest

__all__ = ["Named", "ReadBucket"]

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class ReadBucket:
    """One bucket's bytes, and those tensors cut over several buckets that this bucket completes."""

    manifest: Manifest
    index: int
    data: torch.Tensor  # uint8 [nbytes]
    cut: Mapping[int, torch.Tensor]  # by their index in the manifest, uint8 [nbytes] each

    def tensors(self, skip: Collection[int] = ()) -> list[Named]:
        """Return the tensors that are whole now, by checkpoint name. `skip`: manifest indices to leave out."""
        manifest = self.manifest
        names = manifest.tensors.names
        found = []
        for piece in manifest.bucket_pieces(self.index):
            tensor = int(manifest.piece_tensor[piece])
            if tensor in skip:
                continue
            start, nbytes = int(manifest.piece_offset[piece]), int(manifest.piece_nbytes[piece])
            if nbytes == int(manifest.tensors.sizes[tensor]):
                found.append((names[tensor], self._as_pushed(tensor, self.data[start : start + nbytes])))
            elif tensor in self.cut:
                found.append((names[tensor], self.whole(tensor)))
        return found

    def whole(self, tensor: int) -> torch.Tensor:
        """Return a tensor that was cut, and is whole now."""
        return self._as_pushed(tensor, self.cut[tensor])

    def _as_pushed(self, tensor: int, data: torch.Tensor) -> torch.Tensor:
        table = self.manifest.tensors
        shape = table.shapes[tensor]
        assert data.numel() == math.prod(shape) * int(table.itemsizes[tensor])
        dtype: torch.dtype = getattr(torch, table.dtypes[tensor])
        return data.view(dtype).view(shape)
