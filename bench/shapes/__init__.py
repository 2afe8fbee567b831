"""Shapes of published models, without weights: every tensor's Hugging Face name, shape and type, from its config alone.

`NAME.json` beside this file holds the values of a published `config.json` that determine the tensors, its URL, and the
counts that Hugging Face gives for the checkpoint, which the tests compare. `--shape` also takes the path of such a
file, or of a bare `config.json` of one of these families. Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Part = Callable[[str], Iterator["Named"]]  # the tensors of a part of the layer with this prefix

__all__ = ["Model", "Tensor", "load", "names"]

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1}
Config = dict[str, Any]
Named = tuple[str, "Tensor"]


class Tensor(NamedTuple):
    """Shape and type of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Model:
    """One model's shapes, perhaps with fewer layers than were published."""

    name: str
    source: str  # URL of its config
    published: dict[str, Any]  # counts of the published checkpoint: parameters by type, tensors
    config: Config

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, in the checkpoint's order. A tied head is not listed."""
        return dict(FAMILIES[self.config["model_type"]](self.config))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, once."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_layers(self, layers: int | None) -> Model:
        """Return this model with `layers` layers instead of its own number (None: unchanged)."""
        if layers is None:
            return self
        most = self.config["num_hidden_layers"]
        if not 1 <= layers <= 4 * most:
            raise ConfigError(f"--layers {layers}: {self.name} has {most}; say 1 to {4 * most}")
        return Model(self.name, self.source, self.published, self.config | {"num_hidden_layers": layers})

    def fitting(self, nbytes: int) -> Model:
        """Return this model with the most layers that fit into `nbytes`, one at least."""
        low, high = 1, int(self.config["num_hidden_layers"])
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.with_layers(middle).nbytes <= nbytes else (low, middle - 1)
        return self.with_layers(low)

    def write(self, directory: Path) -> None:
        """Write `config.json` into an existing directory, for an engine that starts with dummy weights."""
        (directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def names() -> list[str]:
    """Return the names of the shape files that come with the benchmarks."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def load(name: str) -> Model:
    """Load a model by its name in `names()`, or by the path of a shape file or `config.json`. Raises `ConfigError`."""
    path = Path(__file__).with_name(f"{name}.json") if name in names() else Path(name)
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        why = f"{name!r} is no shape file: {error}"
        raise ConfigError(why, hint=f"one of {', '.join(names())}, or a path") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    config = document.get("config", document)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{path}: model_type is {family!r}", hint=f"known families are {', '.join(FAMILIES)}")
    return Model(document.get("model", path.stem), document.get("source", ""), document.get("published", {}), config)


def llama(config: Config) -> Iterator[Named]:
    """Llama: attention of grouped queries, a dense MLP."""
    yield from _decoder(config, lambda layer: _attention(config, layer), lambda layer: _dense(config, layer))


def qwen3(config: Config) -> Iterator[Named]:
    """Qwen3: Llama's, with norms of queries and keys."""
    yield from _decoder(config, lambda layer: _normed_attention(config, layer), lambda layer: _dense(config, layer))


def qwen3_moe(config: Config) -> Iterator[Named]:
    """Qwen3-MoE: experts in place of the MLP, but for the layers that the config excepts."""

    def mlp(layer: str) -> Iterator[Named]:
        index = int(layer.rpartition(".")[2])
        if index in config.get("mlp_only_layers", ()) or (index + 1) % config.get("decoder_sparse_step", 1):
            yield from _dense(config, layer)
            return
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        yield f"{layer}.mlp.gate.weight", Tensor((config["num_experts"], hidden), config["torch_dtype"])
        for expert in range(config["num_experts"]):
            yield from _gated(f"{layer}.mlp.experts.{expert}", hidden, inner, config["torch_dtype"])

    yield from _decoder(config, lambda layer: _normed_attention(config, layer), mlp)


def deepseek_v3(config: Config) -> Iterator[Named]:
    """DeepSeek-V3: latent attention, routed and shared experts, matrices in FP8 with a scale for each block, and the
    layers that predict further tokens, numbered after the others with an embedding and a head of their own.
    """
    hidden, heads, dtype = config["hidden_size"], config["num_attention_heads"], config["torch_dtype"]
    high, wide = _block(config)

    def matrix(name: str, rows: int, columns: int) -> Iterator[Named]:
        if not high:
            yield f"{name}.weight", Tensor((rows, columns), dtype)
            return
        yield f"{name}.weight", Tensor((rows, columns), "float8_e4m3fn")
        yield f"{name}.weight_scale_inv", Tensor((-(-rows // high), -(-columns // wide)), "float32")

    def gated(name: str, inner: int) -> Iterator[Named]:
        yield from matrix(f"{name}.gate_proj", inner, hidden)
        yield from matrix(f"{name}.up_proj", inner, hidden)
        yield from matrix(f"{name}.down_proj", hidden, inner)

    def attention(layer: str) -> Iterator[Named]:
        at, low_q, low_kv = f"{layer}.self_attn", config["q_lora_rank"], config["kv_lora_rank"]
        plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        yield from matrix(f"{at}.q_a_proj", low_q, hidden)
        yield f"{at}.q_a_layernorm.weight", Tensor((low_q,), dtype)
        yield from matrix(f"{at}.q_b_proj", heads * (plain + rotary), low_q)
        yield from matrix(f"{at}.kv_a_proj_with_mqa", low_kv + rotary, hidden)
        yield f"{at}.kv_a_layernorm.weight", Tensor((low_kv,), dtype)
        yield from matrix(f"{at}.kv_b_proj", heads * (plain + value), low_kv)
        yield from matrix(f"{at}.o_proj", hidden, heads * value)

    def mlp(layer: str) -> Iterator[Named]:
        if int(layer.rpartition(".")[2]) < config["first_k_dense_replace"]:
            yield from gated(f"{layer}.mlp", config["intermediate_size"])
            return
        experts = config["n_routed_experts"]
        yield f"{layer}.mlp.gate.weight", Tensor((experts, hidden), dtype)
        yield f"{layer}.mlp.gate.e_score_correction_bias", Tensor((experts,), "float32")
        for expert in range(experts):
            yield from gated(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        yield from gated(f"{layer}.mlp.shared_experts", config["n_shared_experts"] * config["moe_intermediate_size"])

    yield from _decoder(config, attention, mlp)
    for extra in range(config.get("num_nextn_predict_layers", 0)):
        layer = f"model.layers.{config['num_hidden_layers'] + extra}"
        vocabulary = Tensor((config["vocab_size"], hidden), dtype)
        yield f"{layer}.embed_tokens.weight", vocabulary
        yield f"{layer}.enorm.weight", Tensor((hidden,), dtype)
        yield f"{layer}.hnorm.weight", Tensor((hidden,), dtype)
        yield f"{layer}.eh_proj.weight", Tensor((hidden, 2 * hidden), dtype)
        yield from _layer(config, layer, attention, mlp)
        yield f"{layer}.shared_head.norm.weight", Tensor((hidden,), dtype)
        yield f"{layer}.shared_head.head.weight", vocabulary


FAMILIES: dict[str, Callable[[Config], Iterator[Named]]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
}


def _decoder(config: Config, attention: Part, mlp: Part) -> Iterator[Named]:
    vocabulary = Tensor((config["vocab_size"], config["hidden_size"]), config["torch_dtype"])
    yield "model.embed_tokens.weight", vocabulary
    for index in range(config["num_hidden_layers"]):
        yield from _layer(config, f"model.layers.{index}", attention, mlp)
    yield "model.norm.weight", Tensor((config["hidden_size"],), config["torch_dtype"])
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", vocabulary


def _layer(config: Config, layer: str, attention: Part, mlp: Part) -> Iterator[Named]:
    norm = Tensor((config["hidden_size"],), config["torch_dtype"])
    yield from attention(layer)
    yield from mlp(layer)
    yield f"{layer}.input_layernorm.weight", norm
    yield f"{layer}.post_attention_layernorm.weight", norm


def _attention(config: Config, layer: str) -> Iterator[Named]:
    hidden, dim, dtype = config["hidden_size"], _head_dim(config), config["torch_dtype"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield f"{layer}.self_attn.q_proj.weight", Tensor((queries, hidden), dtype)
    yield f"{layer}.self_attn.k_proj.weight", Tensor((keys, hidden), dtype)
    yield f"{layer}.self_attn.v_proj.weight", Tensor((keys, hidden), dtype)
    yield f"{layer}.self_attn.o_proj.weight", Tensor((hidden, queries), dtype)


def _normed_attention(config: Config, layer: str) -> Iterator[Named]:
    yield from _attention(config, layer)
    for norm in ("q_norm", "k_norm"):
        yield f"{layer}.self_attn.{norm}.weight", Tensor((_head_dim(config),), config["torch_dtype"])


def _dense(config: Config, layer: str) -> Iterator[Named]:
    yield from _gated(f"{layer}.mlp", config["hidden_size"], config["intermediate_size"], config["torch_dtype"])


def _gated(name: str, hidden: int, inner: int, dtype: str) -> Iterator[Named]:
    yield f"{name}.gate_proj.weight", Tensor((inner, hidden), dtype)
    yield f"{name}.up_proj.weight", Tensor((inner, hidden), dtype)
    yield f"{name}.down_proj.weight", Tensor((hidden, inner), dtype)


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _block(config: Config) -> tuple[int, int]:
    """Return the rows and columns of a block that shares a scale; zeros if nothing is quantised."""
    high, wide = config.get("quantization_config", {}).get("weight_block_size", (0, 0))
    return high, wide
