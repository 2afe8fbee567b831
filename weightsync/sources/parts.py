"""Parts of tensors, said one by one: for trainers that cut their weights in a way of their own."""

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
    """Parts of checkpoint tensors, each where it lies on this rank: nothing is gathered, and nothing is copied but into
    slots. All ranks' parts together must be all of each tensor; what several ranks hold is sent by one of them.

    `aliases` are pairs of a tied tensor's name and the name under which it is sent.
    """

    def __init__(self, parts: Iterable[Part], aliases: Iterable[tuple[str, str]] = ()) -> None:
        """Raises `SourceError` naming the first tensor of which a part cannot be pushed."""
        held = list(parts)
        for part in held:
            if not isinstance(part.data, torch.Tensor):
                raise SourceError(f"a part of {part.name!r} is {type(part.data).__name__}, not a tensor")
        self._shards = [plain_data(part.name, part.data) for part in held]
        self._layout = Layout.of(map(_shard, held), aliases)


def _shard(part: Part) -> Shard:
    dtype = str(part.data.dtype).removeprefix("torch.")
    return Shard(part.name, dtype, tuple(part.shape), tuple(part.offset), tuple(part.data.shape))
