"""The whole decoder as a trainer holds it: parameter names are the checkpoint's names, layers can be `fully_shard`ed.

    model = load_checkpoint("DIR")
    logits = model(input_ids)                  # int64[B, T] → float32[B, T, vocab]
    tokens = greedy(model, [1, 2, 3], 8)

Computes in float32 (`ops.py`). While gradients are recorded every expert sees every token, weighted by zero if it was
not chosen. So each parameter has a gradient on every rank; otherwise FSDP ranks would disagree on what they reduce.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

from weightsync.adapters.reference import ops
from weightsync.adapters.reference.checkpoint import open_checkpoint, random_checkpoint, save_tensors
from weightsync.adapters.reference.config import ModelConfig, read_config, write_config
from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CausalLM", "greedy", "load_checkpoint", "random_checkpoint", "save_checkpoint"]

Tensor = torch.Tensor
Tables = tuple[Tensor, Tensor]  # cos, sin


class Weight(nn.Module):
    """One uninitialised parameter called `weight`."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))


class Linear(Weight):
    """weight[out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)


class Norm(Weight):
    """weight[dim]."""

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__(dim, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(Weight):
    """weight[vocab, hidden]."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return functional.embedding(input_ids, self.weight).float()


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.q_proj = Linear(queries, hidden, dtype=dtype)
        self.k_proj = Linear(keys, hidden, dtype=dtype)
        self.v_proj = Linear(keys, hidden, dtype=dtype)
        self.o_proj = Linear(hidden, queries, dtype=dtype)
        self.q_norm = Norm(dim, config.rms_norm_eps, dtype=dtype)
        self.k_norm = Norm(dim, config.rms_norm_eps, dtype=dtype)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """x[B, T, hidden] → [B, T, hidden]."""
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        return cast("Tensor", self.o_proj(ops.attention(ops.rotate(q, tables), ops.rotate(k, tables), v)))


class MLP(nn.Module):
    """A dense layer's MLP, or one expert."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(inner, hidden, dtype=dtype)
        self.up_proj = Linear(inner, hidden, dtype=dtype)
        self.down_proj = Linear(hidden, inner, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Experts(nn.Module):
    """A sparse layer: the router and its experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(config.num_experts, config.hidden_size, dtype=dtype)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size, dtype) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        share = ops.route(self.gate(tokens), self.config.num_experts_per_tok, self.config.norm_topk_prob)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            if torch.is_grad_enabled() or bool(share[:, number].any()):
                total = total + expert(tokens) * share[:, number, None]
        return total.view_as(x)


class Layer(nn.Module):
    """One decoder layer; the unit to `fully_shard`."""

    def __init__(self, config: ModelConfig, number: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(config, dtype)
        self.mlp = (
            Experts(config, dtype)
            if config.sparse(number)
            else MLP(config.hidden_size, config.intermediate_size, dtype)
        )
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return cast("Tensor", x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and last norm; checkpoints call it `model`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Layer(config, number, dtype) for number in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        length, config = input_ids.shape[-1], self.config
        tables = ops.rotary_tables(0, length, config.head_dim, config.rope_theta, x.device)
        for layer in self.layers:
            x = layer(x, tables)
        return cast("Tensor", self.norm(x))


class CausalLM(nn.Module):
    """The decoder with its head. Its parameters start uninitialised, in `config.dtype`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dtype: torch.dtype = getattr(torch, config.dtype)
        self.config = config
        self.model = Decoder(config, dtype)
        self.lm_head = Linear(config.vocab_size, config.hidden_size, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64[B, T] → logits, float32[B, T, vocab]."""
        return cast("Tensor", self.lm_head(self.model(input_ids)))


@torch.no_grad()
def greedy(model: nn.Module, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Return the most likely continuation, token by token, without a cache; ends early at `config.eos_token_id`.

    With a `fully_shard`ed model every rank must call it.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    tokens = list(prompt_ids)
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in config.eos_token_id:
            break
    return tokens[len(prompt_ids) :]


def load_checkpoint(directory: str | Path) -> CausalLM:
    """Load the model of a safetensors directory. Raises `ConfigError` naming a tensor that is missing or misshapen."""
    config = read_config(directory)
    if config.weight_block_size is not None:
        raise ConfigError(f"{directory} is quantised, and nothing to train from", hint="its checkpoint in bfloat16")
    model = CausalLM(config)
    with open_checkpoint(directory, model.config) as tensors, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.read(name))
    return model


def save_checkpoint(model: CausalLM, directory: str | Path) -> None:
    """Write a plain, unsharded model as a safetensors directory, which is made if it does not exist."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_tensors(iter(tensors.items()), directory)
    write_config(model.config, directory)
