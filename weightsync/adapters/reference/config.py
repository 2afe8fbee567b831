"""The model's shape, read from and written to Hugging Face's `config.json` (Qwen3 and Qwen3-MoE). No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from weightsync.errors import ConfigError

__all__ = ["ModelConfig", "read_config", "write_config"]

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]

_MODEL_TYPES = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and type of one decoder. Fields have the names of `config.json`."""

    architecture: Literal["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"] = "Qwen3ForCausalLM"
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size  # of the dense layers
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: _Size
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-6
    rope_theta: Annotated[float, msgspec.Meta(gt=0)] = 10000.0
    max_position_embeddings: _Size = 32768
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()  # generation ends at any of these
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of every parameter
    # Qwen3-MoE only
    num_experts: _Count = 0
    num_experts_per_tok: _Count = 0
    moe_intermediate_size: _Count = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: _Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    weight_block_size: tuple[_Size, _Size] | None = None  # set: projections are float8, with a scale for each block

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the key, if no decoder can be built from these values."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, no multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.moe:
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(
                    f"num_experts_per_tok is {self.num_experts_per_tok}; "
                    f"it must be 1 to num_experts ({self.num_experts})"
                )
            if self.moe_intermediate_size < 1:
                raise ValueError("moe_intermediate_size must be at least 1")
        elif self.num_experts:
            raise ValueError(f"num_experts is {self.num_experts}, but {self.architecture} has no experts")

    @property
    def moe(self) -> bool:
        """Whether some layers may have experts."""
        return self.architecture == "Qwen3MoeForCausalLM"

    def sparse(self, layer: int) -> bool:
        """Whether `layer` has experts in place of one MLP."""
        return self.moe and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def read_config(directory: str | Path) -> ModelConfig:
    """Read the config of a Hugging Face checkpoint directory. Raises `ConfigError` naming the key that does not fit."""
    path = Path(directory) / "config.json"
    try:
        raw: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="give a Hugging Face checkpoint directory"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    try:
        return msgspec.convert(_own_words(raw), ModelConfig)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{path}: {error}", hint="the reference engine serves Qwen3 and Qwen3-MoE") from error


def write_config(config: ModelConfig, directory: str | Path) -> None:
    """Write `config.json` into an existing directory, as transformers 4 and 5, vLLM and SGLang read it."""
    fields = msgspec.to_builtins(config)
    block = fields.pop("weight_block_size")
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    architecture = fields.pop("architecture")
    eos = fields.pop("eos_token_id")
    if not config.moe:
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            del fields[key]
        del fields["decoder_sparse_step"], fields["mlp_only_layers"]
    document = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        **fields,
        **({"quantization_config": quantised} if block else {}),
        "torch_dtype": config.dtype,
        "eos_token_id": list(eos) or None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_cache": True,
        "use_sliding_window": False,
    }
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _own_words(raw: dict[str, Any]) -> dict[str, Any]:
    """Translate `config.json` to the fields of `ModelConfig`. Raises `ValueError` for features not supported here."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError("rope_parameters: only the default rotary embedding is supported")
    for key in ("attention_bias", "use_sliding_window"):
        if raw.get(key):
            raise ValueError(f"{key} is set, which is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")
    quantised = raw.get("quantization_config") or {}
    if quantised and (quantised.get("quant_method") != "fp8" or not quantised.get("weight_block_size")):
        raise ValueError("quantization_config: only fp8 with a weight_block_size is supported")
    architectures = raw.get("architectures") or ["none"]
    raw = raw | {"weight_block_size": quantised.get("weight_block_size")}
    found = {key: raw[key] for key in ModelConfig.__struct_fields__ if raw.get(key) is not None}
    found["architecture"] = architectures[0]
    if "num_local_experts" in raw:  # as transformers 5 writes it
        found["num_experts"] = raw["num_local_experts"]
    eos = found.get("eos_token_id", ())
    found["eos_token_id"] = [eos] if isinstance(eos, int) else eos
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    found["dtype"] = str(dtype).removeprefix("torch.")
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if "head_dim" not in found and {"hidden_size", "num_attention_heads"} <= found.keys():
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if architectures[0] == "Qwen3ForCausalLM":
        found.pop("num_experts", None)
    return found
