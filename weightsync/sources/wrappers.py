"""The known modules that wrap another one and do not show in a checkpoint's names.

They are recognised by class, never by name: a model may well have a submodule called `module`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["is_fsdp1", "is_fsdp2", "unwrapped", "unwrapped_names", "wrapped_in"]

_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
_FSDP2 = ("torch.distributed.fsdp", "FSDPModule")
# {(module that defines the class, class): the attribute that is the wrapped module}. FSDP2 wraps nothing.
_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",  # of torch.compile
    # Checkpoint and offload wrappers of activations.
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
    _FSDP1: "_fsdp_wrapped_module",
}


def wrapped_in(kind: type) -> str | None:
    """Return the attribute in which modules of this class keep the wrapped module; None if they are no wrappers."""
    for known, attribute in _WRAPPERS.items():
        if _is_a(kind, known):
            return attribute
    return None


def is_fsdp1(kind: type) -> bool:
    """Whether modules of this class are FSDP1's."""
    return _is_a(kind, _FSDP1)


def is_fsdp2(kind: type) -> bool:
    """Whether modules of this class are FSDP2's."""
    return _is_a(kind, _FSDP2)


def _is_a(kind: type, known: tuple[str, str]) -> bool:
    """Whether `kind` is a subclass of the known class. Imports nothing: a process with such a module has its class."""
    module, name = known
    wrapper = getattr(sys.modules.get(module), name, None)
    return wrapper is not None and issubclass(kind, wrapper)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside its wrappers. FSDP1's wrappers stay, because they hold parameters."""
    while (attribute := wrapped_in(type(module))) is not None and not is_fsdp1(type(module)):
        module = module.get_submodule(attribute)
    return module


def unwrapped_names(module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield every module in this one, itself first, in the order of `named_modules(remove_duplicate=False)`.

    Each comes as the prefix of its parameters' names there, the same prefix without wrappers, and the module.
    """
    wrapped = {kind: wrapped_in(kind) for kind in {type(one) for one in module.modules()}}

    def walk(one: nn.Module, full: str, short: str) -> Iterator[tuple[str, str, nn.Module]]:
        yield full, short, one
        for name, child in one._modules.items():
            if child is not None:
                yield from walk(child, f"{full}{name}.", short if name == wrapped[type(one)] else f"{short}{name}.")

    return walk(module, "", "")
