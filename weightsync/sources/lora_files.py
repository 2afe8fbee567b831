"""A LoRA adapter as the two files that peft saves and engines read: its configuration and its matrices.

A LoRA adapter that engines would compute differently from the trainer is refused here, because they ignore some of its
settings without a word.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import save

from weightsync.errors import SourceError
from weightsync.sources.dtensors import is_dtensor
from weightsync.sources.wrappers import unwrapped

__all__ = ["adapter_files"]

# Fields of peft 0.21's LoraConfig that change what layers compute. vLLM 0.32 refuses most; SGLang 0.5.23 ignores them.
_NOT_SERVED = (
    *("use_dora", "modules_to_save", "lora_bias", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "layer_replication", "use_bdlora"),
)
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "lora_ga")  # leave the base model alone (vLLM's `_init_is_supported`)
_MERGED = "push_weights(model, version=...) sends the model with the adapter merged"


def adapter_files(lora: Any, config: Any = None, *, gather: bool = False) -> tuple[bytes, bytes]:
    """Return the bytes of `adapter_config.json` and `adapter_model.safetensors` of a LoRA adapter.

    lora: a `PeftModel`, of which the active adapter is taken; or a mapping of names, as in the second file, to tensors.
    config: for a mapping: peft's, or a mapping as in the first file.
    gather: whether DTensors are gathered, which is a collective.

    Raises `SourceError` if engines would compute the adapter differently from the trainer.
    """
    if isinstance(lora, Mapping):
        if config is None:
            raise SourceError(
                "the tensors of a LoRA adapter were given without its config", hint="config=LoraConfig(...)"
            )
        tensors, said = dict(lora), _plain(config)
        _check(said)
    else:
        tensors, said = _of_peft(unwrapped(lora) if isinstance(lora, torch.nn.Module) else lora)
    said |= _scaled_plainly(said)
    return json.dumps(said, indent=2).encode(), save({name: _whole(name, t, gather) for name, t in tensors.items()})


def _of_peft(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if "peft" not in sys.modules or not isinstance(model, import_module("peft").PeftModel):
        raise SourceError(
            f"{type(model).__name__} is no PeftModel",
            hint="give one, or the tensors of its adapter and config=LoraConfig(...)",
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise SourceError(
            f"{len(active)} adapters are active ({', '.join(active)}), and engines serve one", hint=_MERGED
        )
    (adapter,) = active
    said = _plain(model.peft_config[adapter])
    _check(said)
    _check_layers(model, adapter, said)
    tensors = import_module("peft").get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return tensors, said


def _plain(config: Any) -> dict[str, Any]:
    said = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return {key: _jsonable(value) for key, value in said.items()} | {"inference_mode": True}


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.value if hasattr(value, "value") else value  # peft's enums


def _check(said: dict[str, Any]) -> None:
    """Raise `SourceError` for a config that engines refuse or do not follow."""
    if said.get("peft_type") != "LORA":
        raise SourceError(f"an adapter of type {said.get('peft_type')} is no LoRA adapter", hint=_MERGED)
    for key in _NOT_SERVED:
        if said.get(key):
            raise SourceError(f"engines do not serve a LoRA adapter with {key} = {said[key]!r}", hint=_MERGED)
    init = said.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise SourceError(
            f"peft changes the base model's weights with init_lora_weights = {init!r}, and engines have them unchanged",
            hint=_MERGED,
        )
    if said.get("bias", "none") != "none":
        raise SourceError(f"engines do not serve a LoRA adapter with bias = {said['bias']!r}", hint=_MERGED)
    if said.get("rank_pattern") or said.get("alpha_pattern"):
        raise SourceError(
            "engines scale all layers alike: rank_pattern and alpha_pattern are not for them", hint=_MERGED
        )


def _scaled_plainly(said: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that replace `use_rslora` by an equal `lora_alpha`.

    SGLang (0.5.23, `srt/lora/lora.py`) scales by `lora_alpha / r` whatever `use_rslora` says.
    """
    if not said.get("use_rslora"):
        return {}
    return {"use_rslora": False, "lora_alpha": said["lora_alpha"] * said["r"] ** 0.5}


def _check_layers(model: Any, adapter: str, said: dict[str, Any]) -> None:
    """Raise `SourceError` for a layer that computes or scales differently from how engines read the config."""
    wanted = said["lora_alpha"] / (said["r"] ** 0.5 if said.get("use_rslora") else said["r"])
    for name, module in model.named_modules():
        variant = getattr(module, "lora_variant", None)
        if isinstance(variant, dict) and variant.get(adapter) is not None:
            kind = type(variant[adapter]).__name__
            raise SourceError(f"layer {name!r} is of the variant {kind}, which engines do not serve", hint=_MERGED)
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and abs(scaling.get(adapter, wanted) - wanted) > 1e-9 * wanted:
            raise SourceError(
                f"layer {name!r} scales by {scaling[adapter]:g}, and its config says {wanted:g}", hint=_MERGED
            )


def _whole(name: str, tensor: Any, gather: bool) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise SourceError(f"{name!r} is {type(tensor).__name__}, not a tensor")
    whole = tensor.detach()
    if is_dtensor(whole):
        if not gather:
            raise SourceError(
                f"tensor {name!r} of the adapter is sharded",
                hint="push_lora(..., gather=True), on all ranks at the same place: it gathers the LoRA matrices alone",
            )
        whole = whole.full_tensor()
    return whole.to("cpu").clone(memory_format=torch.contiguous_format)
