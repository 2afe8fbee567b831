"""Sources of weights: they describe what a trainer's ranks hold, and copy it into slots.

    source = source_of(model)           # or a mapping, pairs of (name, tensor), or CheckpointSource("/path")
    source = source_of(model, dtype="bfloat16")

Importing this loads no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from weightsync.errors import SourceError
from weightsync.sources.base import Source

if TYPE_CHECKING:
    from weightsync.sources.checkpoint import CheckpointSource
    from weightsync.sources.fp8 import Fp8
    from weightsync.sources.lora import LoraSource
    from weightsync.sources.megatron import MegatronSource
    from weightsync.sources.module import ModuleSource
    from weightsync.sources.parts import Part, PartSource
    from weightsync.sources.selected import Only, Rename
    from weightsync.sources.tensors import TensorSource

__all__ = [
    "CheckpointSource",
    "Fp8",
    "LoraSource",
    "MegatronSource",
    "ModuleSource",
    "Part",
    "PartSource",
    "Source",
    "TensorSource",
    "source_of",
]

_LAZY = {
    "CheckpointSource": "weightsync.sources.checkpoint",
    "Fp8": "weightsync.sources.fp8",
    "MegatronSource": "weightsync.sources.megatron",
    "LoraSource": "weightsync.sources.lora",
    "ModuleSource": "weightsync.sources.module",
    "Part": "weightsync.sources.parts",
    "PartSource": "weightsync.sources.parts",
    "TensorSource": "weightsync.sources.tensors",
}


def source_of(
    weights: object, dtype: Any = None, *, only: Only = None, rename: Rename = None, buffers: bool = False
) -> Source:
    """Return the source for the weights that `push_weights` was given.

    If given, `only` chooses tensors, `rename` gives them other names, and `dtype` converts floating-point tensors. A
    module or tensors that look like recent ones are not described again. Raises `SourceError` for weights that
    `push_weights` does not accept.
    """
    source = _source_of(weights, buffers)
    if only is not None or rename is not None:
        from weightsync.sources.selected import selected

        source = selected(source, only, rename)
    if dtype is None:
        return source
    from weightsync.sources.converted import converted

    return converted(source, dtype)


def _source_of(weights: object, buffers: bool) -> Source:
    torch = sys.modules.get("torch")  # a caller with a module or tensors has imported it
    if torch is not None and isinstance(weights, torch.nn.Module):
        return _source_of_module(weights, buffers)
    if buffers:
        raise SourceError(
            f"buffers = True is for modules, and these weights are a {type(weights).__name__}",
            hint="give buffers among the weights, under their names",
        )
    if isinstance(weights, Source):
        return weights
    single = torch is not None and isinstance(weights, torch.Tensor)
    if isinstance(weights, Mapping | Iterable) and not single and not isinstance(weights, str | bytes):
        from weightsync.sources.tensors import TensorSource, named

        return TensorSource.recalled(*named(weights))
    raise SourceError(
        f"{type(weights).__name__} is nothing that can be pushed",
        hint="give an nn.Module, a mapping of names to tensors, an iterable of (name, tensor) pairs, or an object of "
        "weightsync.sources, such as CheckpointSource(directory)",
    )


def _source_of_module(module: Any, buffers: bool) -> Source:
    from weightsync.sources.module import ModuleSource
    from weightsync.sources.tree import parameters_of
    from weightsync.sources.wrappers import unwrapped

    listed = parameters_of(unwrapped(module))
    if "peft" in sys.modules:
        from weightsync.sources.lora_layers import has_adapters

        if has_adapters(listed.kinds):
            from weightsync.sources.lora import LoraSource

            if buffers:
                raise SourceError("buffers = True is not for models with LoRA adapters", hint="push them by name")
            return LoraSource(module)
    return ModuleSource.of(module, buffers=buffers, listed=listed)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
