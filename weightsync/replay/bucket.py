"""A bucket as a worker has read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from weightsync.plan.manifest import Manifest

__all__ = ["ReadBucket"]


@dataclass(frozen=True)
class ReadBucket:
    """The bytes of a bucket, uint8 [nbytes], and the tensors cut over several that are whole with it, uint8 [nbytes]."""

    manifest: Manifest
    index: int
    data: torch.Tensor
    cut: Mapping[int, torch.Tensor]

    def tensors(self, skip: Collection[int] = ()) -> list[tuple[str, torch.Tensor]]:
        """The tensors that are whole now by checkpoint name, but for those in `skip` (places in the manifest)."""
        manifest = self.manifest
        found = []
        for piece in manifest.bucket_pieces(self.index):
            tensor = int(manifest.piece_tensor[piece])
            if tensor in skip:
                continue
            start, nbytes = int(manifest.piece_offset[piece]), int(manifest.piece_nbytes[piece])
            if nbytes == int(manifest.tensors.sizes[tensor]):
                found.append((manifest.tensors.names[tensor], self._as_pushed(tensor, self.data[start : start + nbytes])))
            elif tensor in self.cut:
                found.append((manifest.tensors.names[tensor], self.whole(tensor)))
        return found

    def whole(self, tensor: int) -> torch.Tensor:
        """One that was cut, and is whole now."""
        return self._as_pushed(tensor, self.cut[tensor])

    def _as_pushed(self, tensor: int, data: torch.Tensor) -> torch.Tensor:
        table = self.manifest.tensors
        shape = table.shapes[tensor]
        assert data.numel() == math.prod(shape) * int(table.itemsizes[tensor])
        dtype: torch.dtype = getattr(torch, table.dtypes[tensor])
        return data.view(dtype).view(shape)
