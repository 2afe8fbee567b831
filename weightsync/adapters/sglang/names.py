"""Check which pushed names a model's `load_weights` would take: SGLang's models skip unknown names silently.

Names are looked up before the push, as paths through the model's modules. A part of a fused module leads to that module
(`q_proj` to `qkv_proj`), and an expert to its stacked tensor. A model that renames what it loads is not judged: if most
names lead nowhere, or the model has a mapper of names, no name is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["follow", "look_up"]

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj_with_mqa",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj_with_mqa",
}
_STACKED = {"gate_proj": "w13", "up_proj": "w13", "w1": "w13", "w3": "w13", "down_proj": "w2", "w2": "w2"}
_LEFT_OUT = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # every model skips these
_MAPPERS = ("hf_to_sglang_mapper", "hf_to_vllm_mapper", "_weights_mapper")
_WEIGHTS = ("weight", "bias", "w13_weight", "w2_weight", "w13_weight_bias", "w2_weight_bias")


def look_up(model: Any, names: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Return the names that lead nowhere in `model`, and the model's weights and biases that no name leads to.

    The second is None if the model cannot be judged; the first is empty then.
    """
    if any(hasattr(model, mapper) for mapper in _MAPPERS):
        return [], None
    places = {id(parameter): name for name, parameter in model.named_parameters()}
    reached: set[int] = set()
    unknown = []
    for name in names:
        found = follow(model, name.split("."))
        if found is not None:
            reached.add(id(found))
        elif not name.endswith(_LEFT_OUT):
            unknown.append(name)
    if len(unknown) * 2 > len(names):
        return [], None
    untouched = [name for key, name in places.items() if key not in reached and name.rpartition(".")[2] in _WEIGHTS]
    return unknown, untouched


def follow(model: Any, parts: list[str]) -> Any:
    """Return the parameter or module attribute at the end of the path; None if the path leads nowhere."""
    here = model
    for i, part in enumerate(parts):
        after = _step(here, part)
        if after is None and part.isdecimal() and parts[i - 1 : i] == ["experts"] and i + 2 < len(parts):
            stack = _STACKED.get(parts[i + 1])
            return None if stack is None else getattr(here, "_".join((stack, *parts[i + 2 :])), None)
        if after is None:
            return None
        here = after
    return here


def _step(here: Any, part: str) -> Any:
    if part.isdecimal() and not hasattr(here, part):
        try:
            return here[int(part)]
        except (TypeError, IndexError, KeyError, NotImplementedError):
            return None
    found = getattr(here, part, None)
    return getattr(here, _FUSED[part], None) if found is None and part in _FUSED else found
