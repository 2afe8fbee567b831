"""For trainers that gather every tensor on every rank: each rank keeps a share of them, and all push together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["rank_and_world", "share"]


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the world size in `torch.distributed`; (0, 1) without it."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(weights: Iterable[tuple[str, Any]], rank: int, world: int) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that `rank` keeps; every rank keeps about the same number of bytes.

    All ranks see `weights` in the same order, and each iterates over all of them: gathering one is a collective.
    """
    held = [0] * world  # bytes
    for name, tensor in weights:
        owner = held.index(min(held))
        held[owner] += tensor.nbytes
        if owner == rank:
            yield name, tensor
