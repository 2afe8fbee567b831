"""Trainers that make every tensor whole on every rank: each rank keeps some of them, and all push together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["rank_and_world", "share"]


def rank_and_world() -> tuple[int, int]:
    """This process's rank in `torch.distributed`, and how many there are; (0, 1) without it."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(weights: Iterable[tuple[str, Any]], rank: int, world: int) -> Iterator[tuple[str, Any]]:
    """Of tensors that all ranks see in the same order, those that `rank` keeps; all keep about as many bytes.

    All are taken from `weights`, on every rank: making one whole is a collective.
    """
    held = [0] * world  # bytes
    for name, tensor in weights:
        owner = held.index(min(held))
        held[owner] += tensor.nbytes
        if owner == rank:
            yield name, tensor
