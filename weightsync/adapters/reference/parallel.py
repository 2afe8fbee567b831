"""The decoder over one rank's slice: fused, stacked and split parameters, all-reduce among the engine's own workers."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed

from weightsync.adapters.reference import ops
from weightsync.adapters.reference.sharding import EMBED, HEAD, SCALE, dtype_of, rank_layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightsync.adapters.reference.config import ModelConfig
    from weightsync.adapters.reference.sharding import Slice

__all__ = ["Choice", "ParallelDecoder", "Ranks", "place_of"]

Tensor = torch.Tensor


class Ranks:
    """The engine's tensor-parallel group, over gloo on the loopback interface. Every collective has a deadline.

    A collective that fails or times out raises `RuntimeError`: the ranks are then out of step, so the worker must end.
    """

    def __init__(self, store_path: str, tp_size: int, tp_rank: int, *, timeout: float) -> None:
        self.tp_size = tp_size
        self.tp_rank = tp_rank
        self._timeout = timedelta(seconds=timeout)
        if tp_size == 1:
            return
        # A group of our own, not torch.distributed's default one: nothing else may meet the ranks in a collective.
        # `Any`, because torch's stubs lack most of ProcessGroupGloo.
        distributed: Any = torch.distributed
        gloo = distributed.ProcessGroupGloo
        options = gloo._Options()
        # Bound to loopback explicitly: gloo would look up the host's name, which may lead to any interface.
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = self._timeout
        self._group = gloo(distributed.FileStore(store_path, tp_size), tp_rank, tp_size, options)

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce in place."""
        if self.tp_size > 1:
            mine = x.cpu()  # x itself, unless it lies on a GPU, which gloo cannot access
            self._group.allreduce([mine]).wait(self._timeout)
            if mine is not x:
                x.copy_(mine)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x` (all of one shape), in rank order."""
        if self.tp_size == 1:
            return [x]
        mine = x.cpu()
        parts = [torch.empty_like(mine) for _ in range(self.tp_size)]
        self._group.allgather([parts], [mine]).wait(self._timeout)
        return [part.to(x.device) for part in parts]


def place_of(box: Slice, params: Mapping[str, Tensor]) -> Tensor:
    """Return the place of a box in its parameter, as a view."""
    stacked = len(box.at) - len(box.shape)
    place = params[box.param][box.at[:stacked]]
    for d, (at, count) in enumerate(zip(box.at[stacked:], box.shape, strict=True)):
        place = place.narrow(d, at, count)
    return place


class Choice(NamedTuple):
    """The next token."""

    token: int
    logprob: float


class ParallelDecoder:
    """One rank's parameters and the forward pass over them, with a key/value cache per running sequence.

    All ranks must call `step` with the same arguments in the same order. Parameters keep their memory for good: loading
    new weights writes into it, between two steps.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.layout = rank_layout(config, ranks.tp_size, ranks.tp_rank)
        self.params = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype_of(config, name)))
            for name, shape in self.layout.params.items()
        }
        self._caches: dict[int, list[tuple[Tensor, Tensor]]] = {}  # sequence → per layer: k, v [Hk, S, D] float32
        self._queries = config.num_attention_heads // ranks.tp_size
        self._keys = max(config.num_key_value_heads // ranks.tp_size, 1)

    @torch.inference_mode()
    def step(self, sequence: int, start: int, tokens: list[int], draw: float | None = None) -> Choice:
        """Append `tokens` to a sequence from position `start` on, and choose the next token.

        Earlier positions are cached; a `start` of 0 drops the cache. The next token is the likeliest, or the one at
        `draw` in the cumulative distribution.
        """
        if start == 0:
            self._caches.pop(sequence, None)
        past = self._caches.get(sequence)
        x = self._embed(torch.tensor(tokens))
        tables = ops.rotary_tables(start, len(tokens), self.config.head_dim, self.config.rope_theta)
        cache: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            normed = self._norm(x, f"{prefix}.input_layernorm.weight")
            attended, kv = self._attend(normed, f"{prefix}.self_attn", tables, past[layer] if past else None)
            cache.append(kv)
            x = x + attended
            normed = self._norm(x, f"{prefix}.post_attention_layernorm.weight")
            x = x + (self._experts(normed, prefix) if self.config.sparse(layer) else self._mlp(normed, prefix))
        self._caches[sequence] = cache
        return self._choose(self._norm(x[-1], "model.norm.weight"), draw)

    def drop(self, sequences: Iterable[int]) -> None:
        """Drop the caches of sequences that have ended."""
        for sequence in sequences:
            self._caches.pop(sequence, None)

    def flush(self) -> None:
        """Drop every cache: they were computed with other weights."""
        self._caches.clear()

    def _weight(self, name: str, expert: int | None = None) -> Tensor:
        """Return a projection's weight, dequantised; of one `expert` if the parameter stacks experts."""
        weight, scale = self.params[name], self.params.get(name + SCALE)
        if expert is not None:
            weight, scale = weight[expert], scale[expert] if scale is not None else None
        if scale is None or self.config.weight_block_size is None:
            return weight
        return ops.dequantised(weight, scale, self.config.weight_block_size)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, self.params[name], self.config.rms_norm_eps)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens. Rows of the vocabulary on other ranks are zeros here; the all-reduce adds them."""
        table = self.params[EMBED]
        local = tokens - self.ranks.tp_rank * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = table[local.where(mine, 0)].float()
        return self.ranks.sum(rows * mine[:, None])

    def _attend(
        self, x: Tensor, prefix: str, tables: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        fused = ops.linear(x, self._weight(f"{prefix}.qkv_proj.weight"))  # [T, (Hq + 2 Hk) · D]
        heads = fused.view(len(x), -1, self.config.head_dim).transpose(0, 1)
        q, k, v = heads.tensor_split((self._queries, self._queries + self._keys))
        q = ops.rotate(self._norm(q, f"{prefix}.q_norm.weight"), tables)
        k = ops.rotate(self._norm(k, f"{prefix}.k_norm.weight"), tables)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        out = ops.linear(ops.attention(q, k, v), self._weight(f"{prefix}.o_proj.weight"))
        return self.ranks.sum(out), (k, v)

    def _mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate_up, down = (
            self._weight(f"{prefix}.mlp.gate_up_proj.weight"),
            self._weight(f"{prefix}.mlp.down_proj.weight"),
        )
        return self.ranks.sum(ops.fused_mlp(x, gate_up, down))

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        w13, w2 = f"{prefix}.mlp.experts.w13.weight", f"{prefix}.mlp.experts.w2.weight"
        logits = ops.linear(x, self.params[f"{prefix}.mlp.gate.weight"])
        share = ops.route(logits, self.config.num_experts_per_tok, self.config.norm_topk_prob)
        total = torch.zeros_like(x)
        for expert in share.any(0).nonzero().flatten().tolist():
            takers = share[:, expert].nonzero().flatten()
            made = ops.fused_mlp(x[takers], self._weight(w13, expert), self._weight(w2, expert))
            total[takers] += made * share[takers, expert, None]
        return self.ranks.sum(total)

    def _choose(self, x: Tensor, draw: float | None) -> Choice:
        head = self.params[EMBED if self.config.tie_word_embeddings else HEAD]
        logits = torch.cat(self.ranks.gather(ops.linear(x, head)))[: self.config.vocab_size]  # without padding rows
        if draw is None:
            token = int(logits.argmax())
        else:
            below = logits.double().softmax(0).cumsum(0)
            token = int((below <= draw * below[-1]).sum())
        return Choice(token, float(logits[token] - logits.logsumexp(0)))
