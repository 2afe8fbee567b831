"""Work out, from whole tensors and without the engine, what each rank of a reference engine must hold.

This is the independent side of the comparison in the demo and the tests. It shares the description of the layout
(`sharding.py`) with the engine, but none of the code that moves bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import xxhash

from weightsync.adapters.reference.sharding import dtype_of, rank_layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.adapters.reference.config import ModelConfig

__all__ = ["expected_checksums"]


def expected_checksums(config: ModelConfig, tensors: Mapping[str, torch.Tensor], tp_size: int) -> list[str]:
    """Return the xxh3 of each rank's parameters, as `GET /checksums` does. `tensors` are whole, by checkpoint name."""
    return [_rank_checksum(config, tensors, tp_size, rank) for rank in range(tp_size)]


def _rank_checksum(config: ModelConfig, tensors: Mapping[str, torch.Tensor], tp_size: int, tp_rank: int) -> str:
    layout = rank_layout(config, tp_size, tp_rank)
    params = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype_of(config, name))) for name, shape in layout.params.items()
    }
    for boxes in layout.slices.values():
        for box in boxes:
            source = tensors[box.tensor]
            for dim, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
                source = source.narrow(dim, start, length)
            target = params[box.param]
            stacked = len(box.at) - len(box.shape)
            for index in box.at[:stacked]:
                target = target[index]
            for dim, (start, length) in enumerate(zip(box.at[stacked:], box.shape, strict=True)):
                target = target.narrow(dim, start, length)
            target.copy_(source)
    hasher = xxhash.xxh3_64()
    for tensor in params.values():
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
