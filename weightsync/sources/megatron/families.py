"""The tables of rules: which rule each parameter of a family has.

Keys are Megatron's names, with `*` for the layer's number. Experts have the same keys however they are kept
(`local_experts.3.linear_fc1`, `linear_fc1.weight3`, `weight1`).

Checkpoint names are those of transformers' models. Megatron's are those of its local and of its Transformer Engine
layers; the latter fuse a norm into the linear layer after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import SourceError
from weightsync.sources.megatron.rules import QKV, Gated, Norm, Rows, Vocabulary, Whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.sources.megatron.held import Rule

__all__ = ["EMBEDDING", "FAMILIES", "OUTPUT", "rules_of"]

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def _layer(rules: Mapping[str, Rule]) -> dict[str, Rule]:
    return {f"decoder.layers.*.{key}": rule for key, rule in rules.items()}


_L = "model.layers.{layer}."

_ENDS: dict[str, Rule] = {
    EMBEDDING: Vocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": Norm("model.norm.weight"),
    OUTPUT: Vocabulary("lm_head.weight"),
}
_ATTENTION = _layer(
    {
        "input_layernorm.weight": Norm(_L + "input_layernorm.weight"),
        "self_attention.linear_qkv.layer_norm_weight": Norm(_L + "input_layernorm.weight"),
        "self_attention.linear_qkv.weight": QKV(
            _L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight", _L + "self_attn.v_proj.weight"
        ),
        "self_attention.linear_qkv.bias": QKV(
            _L + "self_attn.q_proj.bias", _L + "self_attn.k_proj.bias", _L + "self_attn.v_proj.bias"
        ),
        "self_attention.q_layernorm.weight": Norm(_L + "self_attn.q_norm.weight"),
        "self_attention.k_layernorm.weight": Norm(_L + "self_attn.k_norm.weight"),
        "self_attention.linear_proj.weight": Rows(_L + "self_attn.o_proj.weight"),
        "self_attention.linear_proj.bias": Whole(_L + "self_attn.o_proj.bias"),
    }
)
_MLP = _layer(
    {
        "pre_mlp_layernorm.weight": Norm(_L + "post_attention_layernorm.weight"),
        "mlp.linear_fc1.layer_norm_weight": Norm(_L + "post_attention_layernorm.weight"),
        "mlp.linear_fc1.weight": Gated(_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight"),
        "mlp.linear_fc1.bias": Gated(_L + "mlp.gate_proj.bias", _L + "mlp.up_proj.bias"),
        "mlp.linear_fc2.weight": Rows(_L + "mlp.down_proj.weight"),
        "mlp.linear_fc2.bias": Whole(_L + "mlp.down_proj.bias"),
    }
)
_QWEN_EXPERTS = _layer(
    {
        "mlp.router.weight": Whole(_L + "mlp.gate.weight"),
        "mlp.experts.linear_fc1.weight": Gated(
            _L + "mlp.experts.{expert}.gate_proj.weight", _L + "mlp.experts.{expert}.up_proj.weight"
        ),
        "mlp.experts.linear_fc2.weight": Rows(_L + "mlp.experts.{expert}.down_proj.weight"),
    }
)
_QWEN_SHARED_EXPERT = _layer(
    {
        "mlp.shared_experts.linear_fc1.weight": Gated(
            _L + "mlp.shared_expert.gate_proj.weight", _L + "mlp.shared_expert.up_proj.weight"
        ),
        "mlp.shared_experts.linear_fc2.weight": Rows(_L + "mlp.shared_expert.down_proj.weight"),
        "mlp.shared_experts.gate_weight": Whole(_L + "mlp.shared_expert_gate.weight"),
    }
)
_MIXTRAL_EXPERTS = _layer(
    {
        "mlp.router.weight": Whole(_L + "block_sparse_moe.gate.weight"),
        "mlp.experts.linear_fc1.weight": Gated(
            _L + "block_sparse_moe.experts.{expert}.w1.weight", _L + "block_sparse_moe.experts.{expert}.w3.weight"
        ),
        "mlp.experts.linear_fc2.weight": Rows(_L + "block_sparse_moe.experts.{expert}.w2.weight"),
    }
)

_DENSE = _ENDS | _ATTENTION | _MLP

FAMILIES: dict[str, dict[str, Rule]] = {  # by the checkpoint's `model_type`
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "qwen2_moe": _DENSE | _QWEN_EXPERTS | _QWEN_SHARED_EXPERT,
    "qwen3_moe": _DENSE | _QWEN_EXPERTS,
    "mixtral": _DENSE | _MIXTRAL_EXPERTS,
}


def rules_of(model_type: str) -> dict[str, Rule]:
    """Return the table of a family. Raises `SourceError` naming the families that have one."""
    if model_type not in FAMILIES:
        raise SourceError(
            f"no table says where the parameters of a Megatron {model_type!r} lie in its checkpoint",
            hint=f"there are tables of {', '.join(FAMILIES)}; give family= where one of them fits, rules= of your own, "
            "or an mbridge bridge= to export what no rule knows",
        )
    return FAMILIES[model_type]
