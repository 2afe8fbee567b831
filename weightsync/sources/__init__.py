"""Where weights come from: what the ranks of a trainer hold, as a plan wants to know it and as slots want it copied.

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
    from weightsync.sources.lora import LoraSource
    from weightsync.sources.module import ModuleSource
    from weightsync.sources.parts import Part, PartSource
    from weightsync.sources.tensors import TensorSource

__all__ = [
    "CheckpointSource",
    "LoraSource",
    "ModuleSource",
    "Part",
    "PartSource",
    "Source",
    "TensorSource",
    "source_of",
]

_LAZY = {
    "CheckpointSource": "weightsync.sources.checkpoint",
    "LoraSource": "weightsync.sources.lora",
    "ModuleSource": "weightsync.sources.module",
    "Part": "weightsync.sources.parts",
    "PartSource": "weightsync.sources.parts",
    "TensorSource": "weightsync.sources.tensors",
}


def source_of(weights: object, dtype: Any = None) -> Source:
    """The source for whatever `push_weights` was given, with what is floating-point as `dtype` if one is given.

    A module or tensors that look as some did lately are not described again. Raises `SourceError` for what is none of
    what `push_weights` accepts.
    """
    source = _source_of(weights)
    if dtype is None:
        return source
    from weightsync.sources.converted import converted

    return converted(source, dtype)


def _source_of(weights: object) -> Source:
    if isinstance(weights, Source):
        return weights
    torch = sys.modules.get("torch")  # whoever has a module or tensors has imported it
    if torch is not None and isinstance(weights, torch.nn.Module):
        from weightsync.sources.module import ModuleSource, parameters_of

        names, parameters = parameters_of(weights)
        if "peft" in sys.modules:
            from weightsync.sources.lora_layers import is_adapted

            if is_adapted(weights, names):
                from weightsync.sources.lora import LoraSource

                return LoraSource(weights)
        return ModuleSource.recalled(names, parameters)
    single = torch is not None and isinstance(weights, torch.Tensor)
    if isinstance(weights, Mapping | Iterable) and not single and not isinstance(weights, str | bytes):
        from weightsync.sources.tensors import TensorSource, named

        return TensorSource.recalled(*named(weights))
    raise SourceError(
        f"{type(weights).__name__} is nothing that can be pushed",
        hint="give an nn.Module, a mapping of names to tensors, an iterable of (name, tensor) pairs, or an object of "
        "weightsync.sources, such as CheckpointSource(directory)",
    )


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
