"""Parts of tensors, given one by one: for trainers that shard in their own way."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from weightsync.errors import SourceError
from weightsync.plan.manifest import Layout, Shard
from weightsync.sources.plain import plain_data
from weightsync.sources.tensors import TensorSource

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Part", "PartSource"]


class Part(NamedTuple):
    """A box of a checkpoint tensor, and the memory on this rank that holds it."""

    name: str  # of the tensor, in the checkpoint
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of the box in it
    data: torch.Tensor  # of the box's shape, any strides; usually a view of a parameter


class PartSource(TensorSource):
    """Parts of checkpoint tensors, in this rank's memory. Nothing is gathered, and nothing copied except into slots.
    Together, the parts of all ranks must make up each tensor. A part that several ranks hold is sent by one of them.

    `aliases` are pairs of a tied tensor's name and the name under which it is sent.
    """

    def __init__(self, parts: Iterable[Part], aliases: Iterable[tuple[str, str]] = ()) -> None:
        """Raises `SourceError` naming the first tensor with a part that cannot be pushed."""
        held = list(parts)
        for part in held:
            if not isinstance(part.data, torch.Tensor):
                raise SourceError(f"a part of {part.name!r} is {type(part.data).__name__}, not a tensor")
        self._shards = [plain_data(part.name, part.data) for part in held]
        _check_repeated(held, self._shards)
        self._layout = Layout.of(map(_shard, held), aliases)


def _check_repeated(parts: list[Part], shards: list[torch.Tensor]) -> None:
    """Raise `SourceError` for a box that is given twice, from different memory: only one of the two would be sent."""
    seen: dict[tuple[object, ...], tuple[object, ...]] = {}
    for part, data in zip(parts, shards, strict=True):
        shape = tuple(data.shape)
        memory = (data.data_ptr(), [step for step, n in zip(data.stride(), shape, strict=True) if n > 1])
        if 0 not in shape and seen.setdefault((part.name, tuple(part.offset), shape), memory) != memory:
            raise SourceError(
                f"tensor {part.name!r}: its box at offset {tuple(part.offset)} of shape {shape} is given twice, from "
                "different memory",
                hint="give each box once; names of a Megatron rule need {layer}, and {expert} where it is for experts",
            )


def _shard(part: Part) -> Shard:
    dtype = str(part.data.dtype).removeprefix("torch.")
    return Shard(part.name, dtype, tuple(part.shape), tuple(part.offset), tuple(part.data.shape))
