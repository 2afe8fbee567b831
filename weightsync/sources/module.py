"""The parameters of an `nn.Module`: plain, sharded by FSDP2 or FSDP1, and in whatever wrappers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from weightsync.sources.description import describe, recall
from weightsync.sources.flat import flat_weights
from weightsync.sources.tensors import TensorSource
from weightsync.sources.tree import parameters_of, persistent_buffers
from weightsync.sources.wrappers import is_fsdp1, unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from weightsync.plan.manifest import Layout
    from weightsync.sources.tree import Listed

__all__ = ["ModuleSource"]


class ModuleSource(TensorSource):
    """All parameters of a module, tied ones once; with `buffers` also its persistent buffers.

    Names are the module's own, which must be those of the checkpoint that engines read; wrappers (DDP, FSDP1,
    torch.compile, checkpointing of activations) do not show in them. This rank's stretch of an FSDP1 flat parameter is
    cut into boxes.
    """

    def __init__(self, module: nn.Module, *, buffers: bool = False) -> None:
        """Raises `SourceError` naming the first parameter that cannot be pushed."""
        self._describe(module, buffers, describe)

    @classmethod
    def of(cls, module: nn.Module, *, buffers: bool = False, listed: Listed | None = None) -> Self:
        """Make a source of a module, without describing it anew if it looks like a recent one.

        `listed` is what `parameters_of` gives for the unwrapped module, if the caller has it. Raises `SourceError` like
        the constructor.
        """
        source = cls.__new__(cls)
        source._describe(module, buffers, recall, listed)
        return source

    def _describe(
        self,
        module: nn.Module,
        buffers: bool,
        describe: Callable[[tuple[str, ...], Sequence[torch.Tensor]], tuple[Layout, list[torch.Tensor]]],
        listed: Listed | None = None,
    ) -> None:
        module = unwrapped(module)
        listed = parameters_of(module) if listed is None else listed
        more = list(persistent_buffers(module)) if buffers else []
        if any(map(is_fsdp1, listed.kinds)):
            self._layout, self._shards, self._names = flat_weights(module, listed, more, describe)
            return
        names, tensors = listed.names, listed.tensors
        if more:
            names, tensors = (*names, *(name for name, _ in more)), [*tensors, *(buffer for _, buffer in more)]
        self._layout, self._shards = describe(names, tensors)
        self._names = names
