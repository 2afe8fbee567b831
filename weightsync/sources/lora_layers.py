"""Reads from outside what peft has put into a module: which tensors the base model has, and what LoRA adds to each.

peft's layer classes are known only here, and are looked up only after the trainer has imported peft. This relies on
names of peft 0.21: `BaseTunerLayer`, `Linear` and `Embedding` with their `lora_A`, `lora_B`, `scaling`,
`active_adapters`, `merged`, `disable_adapters`, and `AuxiliaryTrainingWrapper` with `ModulesToSaveWrapper`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsync.errors import SourceError
from weightsync.sources.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

__all__ = ["BaseTensor", "Lora", "base_tensors", "has_adapters"]


class Lora(NamedTuple):
    """What one adapter adds to one tensor: `scaling * b @ a`, or the transpose of that."""

    adapter: str
    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float
    transposed: bool

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for tied matrices which are added to tied tensors."""
        return id(self.a), id(self.b), self.scaling, self.transposed


class BaseTensor(NamedTuple):
    """A parameter of the base model, under its name there."""

    name: str
    tensor: torch.Tensor
    loras: tuple[Lora, ...] = ()  # in the order in which peft merges them


def has_adapters(kinds: frozenset[type]) -> bool:
    """Whether any of these classes of modules is peft's. peft must have been imported."""
    known = _Kinds()
    return any(issubclass(kind, known.models + known.layers + known.wrappers) for kind in kinds)


def base_tensors(module: nn.Module) -> list[BaseTensor]:
    """List all parameters of the model under the adapters, tied ones under each of their names.

    If peft trains a copy of a module (`modules_to_save`), the active copy's parameters are listed. Raises `SourceError`
    naming the layer if one computes anything but LoRA's sum.
    """
    kinds = _Kinds()
    module = unwrapped(module)
    others: set[str] = set()
    if isinstance(module, kinds.models):
        config = getattr(module, "active_peft_config", None)
        if config is None or config.is_prompt_learning:
            what = type(module).__name__ if config is None else f"a PeftModel with {config.peft_type.value}"
            raise SourceError(f"{what} has no weights that adapters could be merged into", hint=_LORA_ONLY)
        whole: Any = module
        active = [whole.peft_config[name] for name in whole.active_adapters if name in whole.peft_config]
        others = {str(one.peft_type.value) for one in (config, *active)} - {"LORA"}
        module = whole.get_base_model()
    found = _Walk(kinds)
    tensors = list(found.walk("", module))
    if others:  # their layers look like LoRA's, or the walk had named them; X-LoRA, for one, weighs adapters
        raise SourceError(
            f"a PeftModel with {', '.join(sorted(others))} computes more than LoRA's sum", hint=_LORA_ONLY
        )
    pushed = {id(one.tensor): one.name for one in tensors}
    for name, original in found.replaced:
        if id(original) in pushed:
            raise SourceError(
                f"tensor {name!r} is trained as a copy (modules_to_save), and in the base model it is tied to "
                f"{pushed[id(original)]!r}: engines that tie them would serve one for both",
                hint="give LoraConfig ensure_weight_tying=True, or untie them before get_peft_model",
            )
    return tensors


_LORA_ONLY = (
    "LoRA on Linear, Conv1D and Embedding layers is merged as it is sent; for anything else merge_and_unload() a copy "
    "of the model, and push that"
)


class _Kinds:
    """Classes of peft, which must have been imported."""

    def __init__(self) -> None:
        if "peft" not in sys.modules:
            raise SourceError("the module has no adapters of peft, which nobody has imported", hint="push it as it is")
        peft, layer = import_module("peft"), import_module("peft.tuners.lora.layer")
        tuners, other = import_module("peft.tuners.tuners_utils"), import_module("peft.utils.other")
        self.models: tuple[type, ...] = (peft.PeftModel, peft.PeftMixedModel)
        self.layers: tuple[type, ...] = (tuners.BaseTunerLayer,)
        self.linear: type = layer.Linear
        self.embedding: type = layer.Embedding
        self.wrappers: tuple[type, ...] = (other.AuxiliaryTrainingWrapper,)
        self.copies: type = other.ModulesToSaveWrapper


class _Walk:
    """One pass over a module. `replaced` are parameters that a trained copy replaces, under the copy's names."""

    def __init__(self, kinds: _Kinds) -> None:
        self._kinds = kinds
        self.replaced: list[tuple[str, torch.Tensor]] = []

    def walk(self, path: str, module: nn.Module) -> Iterator[BaseTensor]:
        kinds = self._kinds
        module = unwrapped(module)
        one: Any = module
        if isinstance(module, kinds.models):
            raise SourceError(
                f"module {path!r} is a {type(module).__name__} inside the one that was given",
                hint="push that module itself",
            )
        if isinstance(module, kinds.layers):
            loras = _loras(kinds, path, one)
            for base in self.walk(path, one.base_layer):
                yield base._replace(loras=base.loras + loras) if loras and base.name == _join(path, "weight") else base
        elif isinstance(module, kinds.copies):
            yield from self._copied(path, one)
        elif isinstance(module, kinds.wrappers):
            raise SourceError(f"module {path!r} is in peft's {type(module).__name__}", hint=_LORA_ONLY)
        else:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield BaseTensor(_join(path, name), parameter)
            for name, child in module._modules.items():
                if child is not None:
                    yield from self.walk(_join(path, name), child)

    def _copied(self, path: str, wrapper: Any) -> Iterator[BaseTensor]:
        _refuse_disabled(path, wrapper)
        active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        if not active:
            yield from self.walk(path, wrapper.original_module)
            return
        self.replaced += [(_join(path, name), p) for name, p in wrapper.original_module.named_parameters()]
        yield from self.walk(path, wrapper.modules_to_save[active[0]])


def _loras(kinds: _Kinds, path: str, layer: Any) -> tuple[Lora, ...]:
    """Return what the active adapters of a layer add to its weight."""
    _refuse_disabled(path, layer)  # also if merged: the next forward takes the adapters out of the weight
    if layer.merged:
        return ()  # the weight contains the adapters already, and a merged layer computes with nothing else
    linear = isinstance(layer, kinds.linear)
    if not linear and not isinstance(layer, kinds.embedding):
        kind = type(layer)
        raise SourceError(f"layer {path!r} is peft's {kind.__module__}.{kind.__qualname__}", hint=_LORA_ONLY)
    one: Any = layer
    loras = []
    for adapter in one.active_adapters:
        if adapter not in (one.lora_A if linear else one.lora_embedding_A):
            continue
        variant = getattr(one, "lora_variant", {}).get(adapter)
        if variant is not None or one.use_dora.get(adapter):  # older peft records only DoRA
            called = "DoRA" if variant is None else type(variant).__name__
            raise SourceError(f"adapter {adapter!r} of layer {path!r} is of the variant {called}", hint=_LORA_ONLY)
        if getattr(one, "lora_bias", {}).get(adapter):
            raise SourceError(f"adapter {adapter!r} of layer {path!r} has a bias (lora_bias=True)", hint=_LORA_ONLY)
        if linear:
            a, b, transposed = one.lora_A[adapter].weight, one.lora_B[adapter].weight, bool(one.fan_in_fan_out)
        else:
            a, b, transposed = one.lora_embedding_A[adapter], one.lora_embedding_B[adapter], True
        loras.append(Lora(adapter, a, b, float(one.scaling[adapter]), transposed))
    return tuple(loras)


def _refuse_disabled(path: str, layer: Any) -> None:
    if layer.disable_adapters:
        raise SourceError(
            f"the adapters of {path!r} are disabled, and the model computes without them",
            hint="push outside of `with model.disable_adapter()`, or push model.get_base_model()'s weights by name",
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
