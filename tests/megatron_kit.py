"""For tests of Megatron trainers: real megatron-core models on the CPU, and a checkpoint put into them.

The values of a parameter are computed here from whole tensors, without any rule of `weightsync.sources.megatron`: by
reshaping, by `chunk` along the dimension that Megatron itself marks, and by its own `get_transformer_layer_offset`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as moe_experts
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


@dataclass(frozen=True)
class Shape:
    """A small model of a family, in the words of its `config.json`."""

    model_type: str
    num_hidden_layers: int = 2
    hidden_size: int = 32
    intermediate_size: int = 48
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 8
    vocab_size: int = 101
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v
    num_experts: int = 0
    moe_intermediate_size: int = 20
    shared_expert_intermediate_size: int = 0
    dense_layers: int = 0  # the first layers have no experts

    @property
    def qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")

    def facts(self) -> dict[str, Any]:
        """Return the facts of the checkpoint that `MegatronSource` needs."""
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


def checkpoint(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return random tensors under the names of the family's Hugging Face checkpoint, the same on each rank."""
    h, d = shape.hidden_size, shape.head_dim
    q, kv = shape.num_attention_heads * d, shape.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, h), "model.norm.weight": (h,)}
    if not shape.tie_word_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, h)

    def mlp(prefix: str, inner: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        shapes[f"{prefix}.{names[0]}.weight"] = shapes[f"{prefix}.{names[1]}.weight"] = (inner, h)
        shapes[f"{prefix}.{names[2]}.weight"] = (h, inner)

    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (h,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, h)
            if shape.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        if shape.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (h, q)
        if not shape.num_experts or i < shape.dense_layers:
            mlp(f"{layer}.mlp", shape.intermediate_size)
            continue
        mixtral = shape.model_type == "mixtral"
        block = f"{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
        shapes[f"{block}.gate.weight"] = (shape.num_experts, h)
        for e in range(shape.num_experts):
            mlp(
                f"{block}.experts.{e}",
                shape.moe_intermediate_size,
                ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj"),
            )
        if shape.shared_expert_intermediate_size:
            mlp(f"{block}.shared_expert", shape.shared_expert_intermediate_size)
            shapes[f"{block}.shared_expert_gate.weight"] = (1, h)
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in shapes.items()}


def transformer_config(shape: Shape, dtype: torch.dtype = torch.float32, **options: Any) -> TransformerConfig:
    """Return Megatron's configuration of this model, for the parallel state as it is now."""
    moe: dict[str, Any] = {}
    if shape.num_experts:
        moe = {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": shape.shared_expert_intermediate_size or None,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_layer_freq": [int(i >= shape.dense_layers) for i in range(shape.num_hidden_layers)],
            "expert_model_parallel_size": mpu.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": mpu.get_expert_tensor_parallel_world_size(),
        }
        if shape.shared_expert_intermediate_size:
            moe["moe_shared_expert_gate"] = True
    chosen = {
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim,
        "add_bias_linear": False,
        "add_qkv_bias": shape.attention_bias,
        "qk_layernorm": shape.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": mpu.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": mpu.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": mpu.get_virtual_pipeline_model_parallel_world_size(),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**(chosen | moe | options))


def without_gpus() -> None:
    """Let megatron-core run without GPUs: tensors that it moves to one stay, and experts need no kernels."""
    device = torch.device("cpu")
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: device  # type: ignore[assignment, return-value]
    moe_experts.gg.assert_grouped_gemm_is_available = lambda: None


class NormedColumns(ColumnParallelLinear):  # type: ignore[misc]
    """Stands for Transformer Engine's `LayerNormLinear`: it holds the scale of the norm in front of it."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))


class GroupedLinear(torch.nn.Module):
    """Stands for Megatron's `TEGroupedLinear`: a weight for each expert of this rank, all marked as cut on dimension 0.

    Megatron does not tell Transformer Engine how they are cut, so its `reset_parameters` marks all alike.
    """

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None = None,
        pg_collection: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        world = pg_collection.expt_tp.size()
        size = (output_size // world, input_size) if parallel_mode == "column" else (output_size, input_size // world)
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(size))
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(f"weight{i}", weight)


class ColumnGrouped(GroupedLinear):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"parallel_mode": "column"}))


class RowGrouped(GroupedLinear):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"parallel_mode": "row"}))


def as_transformer_engine(block: Any) -> Any:
    """Change a block of local layers so that parameters are where Transformer Engine's layers have them."""
    for spec in block.layer_specs:
        layer = spec.submodules
        layer.input_layernorm = IdentityOp
        layer.self_attention.submodules.linear_qkv = NormedColumns
        moe = hasattr(layer.mlp.submodules, "experts")
        if moe:
            grouped = MLPSubmodules(linear_fc1=ColumnGrouped, linear_fc2=RowGrouped)
            layer.mlp.submodules.experts = ModuleSpec(module=moe_experts.TEGroupedMLP, submodules=grouped)
        else:
            layer.pre_mlp_layernorm = IdentityOp
            layer.mlp.submodules.linear_fc1 = NormedColumns
    return block


def build(
    shape: Shape, *, pad: int = 16, like_te: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> list[GPTModel]:
    """Build this rank's stages, in order. The vocabulary is padded to a multiple of `pad` for each rank."""
    config = transformer_config(shape, dtype, **options)
    stages = mpu.get_virtual_pipeline_model_parallel_world_size()
    padded = -(-shape.vocab_size // (pad * config.tensor_model_parallel_size)) * pad * config.tensor_model_parallel_size
    models = []
    for vp_stage in range(stages or 1):
        vp = vp_stage if stages else None
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp)
        models.append(
            GPTModel(
                config=config,
                transformer_layer_spec=as_transformer_engine(block) if like_te else block,
                vocab_size=padded,
                max_sequence_length=64,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=shape.tie_word_embeddings,
                vp_stage=vp,
            ).to(dtype)
        )
    return models


def load(models: list[GPTModel], shape: Shape, weights: dict[str, torch.Tensor]) -> None:
    """Put the checkpoint into this rank's stages."""
    with torch.no_grad():
        for vp_stage, model in enumerate(models):
            begin = get_transformer_layer_offset(model.config, vp_stage=vp_stage if len(models) > 1 else None)
            for name, parameter in model.named_parameters():
                parameter.copy_(_of_rank(name, parameter, shape, weights, begin))


def _of_rank(
    name: str, parameter: torch.Tensor, shape: Shape, weights: dict[str, torch.Tensor], begin: int
) -> torch.Tensor:
    tp: int = mpu.get_tensor_model_parallel_world_size()
    rank: int = mpu.get_tensor_model_parallel_rank()
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        own = "model.embed_tokens.weight" if "embed" in name or shape.tie_word_embeddings else "lm_head.weight"
        whole = torch.full((parameter.shape[0] * tp, parameter.shape[1]), -1.0)
        whole[: shape.vocab_size] = weights[own]
        return whole.chunk(tp)[rank]
    if name == "decoder.final_layernorm.weight":
        return weights["model.norm.weight"]
    _, _, local, rest = name.split(".", 3)
    hf = f"model.layers.{begin + int(local)}."
    if rest in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        return weights[hf + "input_layernorm.weight"]
    if rest in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
        return weights[hf + "post_attention_layernorm.weight"]
    attention, groups = hf + "self_attn.", shape.num_key_value_heads
    if rest.startswith("self_attention.linear_qkv."):
        kind = rest.rsplit(".", 1)[1]
        three = [weights[f"{attention}{one}_proj.{kind}"] for one in "qkv"]
        whole = torch.cat([one.reshape(groups, -1, *one.shape[1:]) for one in three], dim=1)
        return whole.flatten(0, 1).chunk(tp)[rank]
    plain = {
        "self_attention.q_layernorm.weight": "q_norm.weight",
        "self_attention.k_layernorm.weight": "k_norm.weight",
        "self_attention.linear_proj.weight": "o_proj.weight",
    }
    if rest in plain:
        whole = weights[attention + plain[rest]]
        if getattr(parameter, "tensor_model_parallel", False):
            whole = whole.chunk(tp, dim=parameter.partition_dim)[rank]  # type: ignore[attr-defined]
        return whole
    mixtral = shape.model_type == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    block = hf + ("block_sparse_moe." if mixtral else "mlp.")
    if rest == "mlp.router.weight":
        return weights[block + "gate.weight"]
    if rest == "mlp.shared_experts.gate_weight":
        return weights[block + "shared_expert_gate.weight"]
    world = tp
    if ".experts." in rest:
        world, rank = mpu.get_expert_tensor_parallel_world_size(), mpu.get_expert_tensor_parallel_rank()
        here = shape.num_experts // mpu.get_expert_model_parallel_world_size()
        first = mpu.get_expert_model_parallel_rank() * here
        if rest in ("mlp.experts.weight1", "mlp.experts.weight2"):
            each = [
                _mlp(weights, f"{block}experts.{first + e}.", names, rest.endswith("1"), world, rank).t()
                for e in range(here)
            ]
            # as it lies in memory: one expert's matrix behind the other's
            return torch.cat([one.reshape(-1) for one in each]).view(parameter.shape)
        number = rest.split(".")[3] if "local_experts" in rest else rest.rsplit("weight", 1)[1]
        block += f"experts.{first + int(number)}."
    elif "shared_experts" in rest:
        block += "shared_expert."
    return _mlp(weights, block, names, "linear_fc1" in rest, world, rank)


def _mlp(
    weights: dict[str, torch.Tensor], prefix: str, names: tuple[str, str, str], first: bool, world: int, rank: int
) -> torch.Tensor:
    gate, up, down = (weights[f"{prefix}{name}.weight"] for name in names)
    if first:
        return torch.cat([gate.chunk(world)[rank], up.chunk(world)[rank]])
    return down.chunk(world, dim=1)[rank]
