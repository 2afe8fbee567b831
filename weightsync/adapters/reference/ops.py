"""The decoder's arithmetic, shared by the whole model and by its tensor-parallel slices.

Everything is computed in float32, whatever the parameters' type, so that both agree to about 1e-5 and decode alike.
Shapes: T new tokens, S tokens so far (S >= T), H heads, D head_dim, E experts; `...` is any batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["attention", "dequantised", "fused_mlp", "linear", "rms_norm", "rotary_tables", "rotate", "route"]

Tensor = torch.Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x[..., in] · weight[out, in]ᵀ → [..., out]."""
    return functional.linear(x, weight.float())


def dequantised(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """float8 weight[out, in] times the scale of each block → float32."""
    wide = scale.repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return weight.float() * wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to unit mean square, then by `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rotary_tables(
    start: int, count: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [count, head_dim / 2], of positions `start` to `start + count - 1`."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(start, start + count, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x[..., H, T, D]: halves, not neighbours, are paired, as in Llama and Qwen."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T positions over all S; returns [..., T, Hq · D].

    Shapes: q[..., Hq, T, D], k and v[..., Hk, S, D].
    """
    groups = q.shape[-3] // k.shape[-3]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=-3), v.repeat_interleave(groups, dim=-3)
    new, total = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if new > 1:
        hidden = torch.ones(new, total, dtype=torch.bool, device=q.device).triu(total - new + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    out: Tensor = scores.softmax(-1) @ v
    return out.transpose(-2, -3).flatten(-2)


def fused_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down · (silu(gate · x) · (up · x)), with `gate` and `up` one weight, gate first."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(functional.silu(gate) * up, down)


def route(logits: Tensor, per_token: int, normalise: bool) -> Tensor:
    """Each token's weight for each expert: router's logits[N, E] → [N, E], all but `per_token` of a row zero."""
    share = logits.softmax(-1)
    top, chosen = share.topk(per_token, dim=-1)
    if normalise:
        top = top / top.sum(-1, keepdim=True)
    return torch.zeros_like(share).scatter(-1, chosen, top)
