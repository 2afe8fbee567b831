"""The parameters of an `nn.Module`, plain or sharded by FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import SourceError
from weightsync.sources.tensors import TensorSource

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModuleSource"]


class ModuleSource(TensorSource):
    """All parameters of a module under their own names, tied ones once. Buffers are not weights and are left out.

    Names are taken as they are: the module's must be those of the checkpoint that engines read. Give
    `{name: tensor}` instead to rename, to leave some out, or to add buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        """Raises `SourceError` naming the first parameter that cannot be pushed."""
        for name, child in module.named_modules():
            if type(child).__name__ == "FullyShardedDataParallel":
                raise SourceError(
                    f"module {name or 'given'!r} is wrapped by FSDP1, whose flat parameters have no checkpoint names",
                    hint="shard with torch.distributed.fsdp.fully_shard, or give a mapping of names to DTensors",
                )
        super().__init__(module.named_parameters(remove_duplicate=False))
