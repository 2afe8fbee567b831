"""FSDP2's modules: what one has gathered is freed before its parameters are listed.

While a module is unsharded its parameters are the gathered ones: in the type that it computes in, and as old as the
last forward. A root stays so after a forward that no backward follows, such as an evaluation, whatever the optimiser
does then. torch's `state_dict()` reshards, too. It takes no communication, and a later backward gathers anew.
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
    """`reshard` those of these modules that are FSDP2's."""
    every = list(modules)
    kinds = {kind for kind in {*map(type, every)} if is_fsdp2(kind)}
    if kinds:
        for module in every:
            if type(module) in kinds:
                reshard(module)


def reshard(module: Any) -> None:
    """Have a module of FSDP2 hold its shards. Raises `SourceError` where it is in use: its parameters would stay
    gathered in a forward, and a backward reads them.
    """
    state = getattr(module._get_fsdp_state(), "_training_state", None)  # torch 2.13's own name; no public way to it
    if state is not None and state.name != "IDLE":
        raise SourceError(
            f"a {type(module).__name__} is inside a forward or backward of FSDP2",
            hint="push between steps; after one that has failed, run one that ends, or the root's reset_iter_state()",
        )
    module.reshard()
