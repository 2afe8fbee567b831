"""Reshards FSDP2's modules before their parameters are listed.

While a module is unsharded, its parameters are the gathered ones: in the type that it computes in, and as old as the
last forward. A root stays unsharded after a forward without a backward, such as an evaluation, whatever the optimiser
does then. Resharding takes no communication, and a later backward gathers anew. torch's `state_dict()` reshards, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.errors import SourceError
from weightsync.sources.wrappers import is_fsdp2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["reshard", "reshard_all"]


def reshard_all(modules: Iterable[nn.Module]) -> None:
    """Reshard the modules among these that are FSDP2's."""
    every = list(modules)
    kinds = {kind for kind in {*map(type, every)} if is_fsdp2(kind)}
    if kinds:
        for module in every:
            if type(module) in kinds:
                reshard(module)


def reshard(module: Any) -> None:
    """Reshard a module of FSDP2.

    Raises `SourceError` if it is in use: in a forward its parameters would stay gathered, and a backward reads them.
    """
    state = getattr(module._get_fsdp_state(), "_training_state", None)  # torch 2.13's private name; none is public
    if state is not None and state.name != "IDLE":
        raise SourceError(
            f"a {type(module).__name__} is inside a forward or backward of FSDP2",
            hint="push between steps; after one that has failed, run one that ends, or the root's reset_iter_state()",
        )
    module.reshard()
