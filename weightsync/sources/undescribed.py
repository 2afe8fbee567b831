"""Weights that could not be described: their rank takes part in the push all the same, so that the others hear why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from weightsync.plan.layout import Layout

if TYPE_CHECKING:
    import torch

__all__ = ["Undescribed"]


class Undescribed:
    """A source without shards, which raises `why` when it is measured."""

    nbytes = 0

    def __init__(self, why: Exception, group: Any = None, *, reduces: bool = False) -> None:
        """`reduces`: the other ranks of `group` are in the collective of `Fp8(all_reduce=True)`."""
        self._why, self._group, self._reduces = why, group, reduces

    def measure(self) -> NoReturn:
        """Raise the reason; if the other ranks are in the collective, there, so that they do not wait for this one."""
        if self._reduces:
            from weightsync.sources.amax import reduce_amax

            reduce_amax({}, (), self._group, self._why)
        raise self._why

    def layout(self) -> Layout:
        """A layout without shards."""
        return Layout.of([])

    def local(self, shard: int) -> torch.Tensor | None:
        """There is no shard."""
        raise IndexError(shard)

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """There is no shard."""
        raise IndexError(shard)

    def box_bytes(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """There is no shard."""
        raise IndexError(shard)
