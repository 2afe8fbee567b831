"""The rules in the families' tables: how Megatron's parameters lie in the tensors of a checkpoint.

All of Megatron's layouts here are taken from megatron-core 0.16.1: `tensor_parallel/layers.py` (which dimension a
linear layer cuts), `transformer/attention.py` (`get_query_key_value_tensors`: one query group after another, each with
its queries, its key, its value) and `transformer/mlp.py` (`glu`: this rank's gates, then its ups).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightsync.sources.megatron.held import Held
    from weightsync.sources.parts import Part

__all__ = ["QKV", "Columns", "Gated", "Norm", "Rows", "Vocabulary", "Whole"]


@dataclass(frozen=True)
class Whole:
    """The whole tensor on each rank: routers, biases of row-parallel layers."""

    name: str

    def __call__(self, held: Held) -> list[Part]:
        shape = tuple(held.data.shape)
        return [held.part(self.name, shape, (0,) * len(shape), held.data)]


@dataclass(frozen=True)
class Norm(Whole):
    """The scale of a norm, whole on each rank and with the checkpoint's values."""

    def __call__(self, held: Held) -> list[Part]:
        if getattr(held.config, "layernorm_zero_centered_gamma", False):
            raise held.error("it holds one less than the checkpoint's scale (config.layernorm_zero_centered_gamma)")
        return super().__call__(held)


@dataclass(frozen=True)
class Columns:
    """A column-parallel layer's weight or bias: each rank has its share of the outputs, dimension 0."""

    name: str

    def __call__(self, held: Held) -> list[Part]:
        return [_cut(held, self.name, 0)]


@dataclass(frozen=True)
class Rows:
    """A row-parallel layer's weight: each rank has its share of the inputs, dimension 1."""

    name: str

    def __call__(self, held: Held) -> list[Part]:
        return [_cut(held, self.name, 1)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of an embedding or an output layer, shared out like columns. Rows of padding are left out."""

    name: str

    def __call__(self, held: Held) -> list[Part]:
        size, rows, width = held.vocab_size, held.data.shape[0], held.data.shape[1]
        if size is None:
            raise held.error(
                "how many of its rows pad the vocabulary is not known",
                hint="give the checkpoint's directory or configuration, or vocab_size=",
            )
        if rows * held.world < size:
            raise held.error(f"all {held.world} ranks have {rows * held.world} rows, a vocabulary of {size} has more")
        start = min(held.rank * rows, size)
        kept = min(rows, size - start)
        return [held.part(self.name, (size, width), (start, 0), held.data[:kept])]


@dataclass(frozen=True)
class Gated:
    """The first layer of a gated MLP: this rank's share of the gates, then its share of the ups."""

    gate: str
    up: str

    def __call__(self, held: Held) -> list[Part]:
        if not getattr(held.config, "gated_linear_unit", True):
            raise held.error("its rule takes it apart into gate and up, and config.gated_linear_unit is False")
        if getattr(held.config, "moe_mlp_glu_interleave_size", None):
            raise held.error("gates and ups are interleaved (config.moe_mlp_glu_interleave_size)")
        rows, *rest = held.data.shape
        if rows % 2:
            raise held.error("gates and ups together are an even number of rows")
        half = rows // 2
        shape, offset = (half * held.world, *rest), (half * held.rank, *(0 for _ in rest))
        return [
            held.part(self.gate, shape, offset, held.data[:half]),
            held.part(self.up, shape, offset, held.data[half:]),
        ]


@dataclass(frozen=True)
class QKV:
    """The fused projection of attention: for each query group its queries, its key and its value.

    If there are more ranks than groups, a rank has some rows of one group.
    """

    query: str
    key: str
    value: str

    def __call__(self, held: Held) -> list[Part]:
        config = held.config
        if getattr(config, "attention_output_gate", False):
            raise held.error("gates of attention's output lie in it (config.attention_output_gate)")
        if getattr(config, "rotary_interleaved", False):
            raise held.error("rows are paired otherwise than in Hugging Face models (config.rotary_interleaved)")
        groups, head = config.num_query_groups, config.kv_channels
        queries = config.num_attention_heads // groups * head  # rows of one group
        rows, *rest = held.data.shape
        whole = groups * (queries + 2 * head)
        if rows * held.world != whole:
            raise held.error(
                f"{config.num_attention_heads} heads of {head} in {groups} groups make {whole} rows, and {held.world} "
                f"ranks have {rows} each"
            )
        low, high = held.rank * rows, (held.rank + 1) * rows  # this rank's rows of the whole
        parts, begin = [], 0
        for group in range(groups):
            for name, length in ((self.query, queries), (self.key, head), (self.value, head)):
                first, last = max(begin, low), min(begin + length, high)
                if first < last:
                    offset = (group * length + first - begin, *(0 for _ in rest))
                    data = held.data[first - low : last - low]
                    parts.append(held.part(name, (groups * length, *rest), offset, data))
                begin += length
        return parts


def _cut(held: Held, name: str, dim: int) -> Part:
    shape = list(held.data.shape)
    if dim >= len(shape):
        raise held.error(f"its rule says that it is cut along dimension {dim}")
    offset = [0] * len(shape)
    offset[dim] = held.rank * shape[dim]
    shape[dim] *= held.world
    return held.part(name, tuple(shape), tuple(offset), held.data)
