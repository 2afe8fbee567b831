"""Work out which boxes of the checkpoint's tensors each tensor-parallel rank holds, and where. No torch, no numpy.

An engine does not keep a checkpoint's tensors: it fuses, stacks, splits and pads them. Per layer, on every rank:

    qkv_proj       the rank's query heads, then its key heads, then its value heads, all × hidden     (column-parallel)
    o_proj         hidden × the rank's query heads                                                      (row-parallel)
    gate_up_proj   the rank's part of gate_proj, then of up_proj, × hidden                             (column-parallel)
    down_proj      hidden × the rank's part                                                             (row-parallel)
    w13, w2        the same two for every expert, stacked in front
    norms, router  whole on every rank

With fewer key/value heads than ranks, neighbouring ranks hold the same head. Embedding and head are split by
vocabulary, padded to a multiple of tp_size; the padding rows belong to no checkpoint tensor.

Each float8 projection, fused or not, has a tensor of scales beside it, which is split at the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.adapters.reference.config import ModelConfig

__all__ = ["EMBED", "HEAD", "SCALE", "RankLayout", "Slice", "check_tp", "checkpoint_tensors", "dtype_of", "rank_layout"]

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCALE = "_scale_inv"  # suffix to the name of a float8 weight
_FLOAT8 = ("_proj.weight", ".experts.w13.weight", ".experts.w2.weight")

Shape = tuple[int, ...]


class Slice(NamedTuple):
    """One box of a checkpoint tensor and its place in this rank. Offsets and shapes are in elements."""

    tensor: str  # checkpoint name
    offset: Shape  # of the box in the checkpoint tensor
    shape: Shape  # of the box
    param: str  # this rank's own parameter
    at: Shape  # of the box in the parameter; begins with the expert's index if the parameter stacks experts


@dataclass(frozen=True)
class RankLayout:
    """The parameters of one rank, and the boxes that they hold."""

    params: dict[str, Shape]  # its own parameters, in order
    slices: dict[str, tuple[Slice, ...]]  # checkpoint name → boxes that this rank holds; absent: none


def check_tp(config: ModelConfig, tp_size: int) -> None:
    """Raise `ConfigError` if `tp_size` ranks cannot share the model, naming the key of `config` that prevents it."""
    if tp_size < 1:
        raise ConfigError(f"tp_size is {tp_size}; it must be at least 1")
    shared = {"num_attention_heads": config.num_attention_heads}
    if any(not config.sparse(layer) for layer in range(config.num_hidden_layers)):
        shared["intermediate_size"] = config.intermediate_size
    if any(config.sparse(layer) for layer in range(config.num_hidden_layers)):
        shared["moe_intermediate_size"] = config.moe_intermediate_size
    for key, value in shared.items():
        if value % tp_size:
            raise ConfigError(
                f"{key} is {value}, which {tp_size} ranks cannot share", hint=f"a tp_size that divides {value}"
            )
    heads = config.num_key_value_heads
    if heads % tp_size and tp_size % heads:
        raise ConfigError(
            f"num_key_value_heads is {heads}, which {tp_size} ranks can neither share nor replicate",
            hint=f"a tp_size that divides {heads}, or a multiple of it",
        )


def checkpoint_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return checkpoint name → shape, in the checkpoint's order. A tied head is not a tensor of its own."""
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    tensors: dict[str, Shape] = {EMBED: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors[f"{attention}.q_proj.weight"] = (queries, hidden)
        tensors[f"{attention}.k_proj.weight"] = (keys, hidden)
        tensors[f"{attention}.v_proj.weight"] = (keys, hidden)
        tensors[f"{attention}.o_proj.weight"] = (hidden, queries)
        tensors[f"{attention}.q_norm.weight"] = (dim,)
        tensors[f"{attention}.k_norm.weight"] = (dim,)
        if config.sparse(layer):
            tensors[f"{prefix}.mlp.gate.weight"] = (config.num_experts, hidden)
            for expert in range(config.num_experts):
                _mlp(tensors, f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
        else:
            _mlp(tensors, f"{prefix}.mlp", hidden, config.intermediate_size)
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, hidden)
    if config.weight_block_size is not None:
        block = config.weight_block_size
        scaled = {name: shape for name, shape in tensors.items() if name.endswith(_FLOAT8)}
        tensors |= {name + SCALE: _blocks(shape, block) for name, shape in scaled.items()}
    return tensors


def dtype_of(config: ModelConfig, name: str) -> str:
    """Return the element type of a checkpoint tensor, or of a rank's parameter."""
    if config.weight_block_size is None:
        return config.dtype
    return "float8_e4m3fn" if name.endswith(_FLOAT8) else "float32" if name.endswith(SCALE) else config.dtype


def rank_layout(config: ModelConfig, tp_size: int, tp_rank: int) -> RankLayout:
    """Return what rank `tp_rank` of `tp_size` holds. Raises `ConfigError` if the model cannot be shared like that."""
    check_tp(config, tp_size)
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"tp_rank is {tp_rank}; it must be 0 to {tp_size - 1}")
    params: dict[str, Shape] = {}
    slices: dict[str, tuple[Slice, ...]] = {}
    for piece in _rank_slices(config, tp_size, tp_rank, params):
        if 0 not in piece.shape:
            slices[piece.tensor] = (*slices.get(piece.tensor, ()), piece)
    if config.weight_block_size is not None:
        block = config.weight_block_size
        scaled = {name: shape for name, shape in params.items() if name.endswith(_FLOAT8)}
        params |= {name + SCALE: _blocks(shape, block) for name, shape in scaled.items()}
        whole = checkpoint_tensors(config)
        slices |= {
            name + SCALE: tuple(_scales(piece, whole[name], block) for piece in pieces)
            for name, pieces in slices.items()
            if name.endswith(_FLOAT8)
        }
    return RankLayout(params, slices)


def _blocks(shape: Shape, block: tuple[int, int]) -> Shape:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _scales(piece: Slice, whole: Shape, block: tuple[int, int]) -> Slice:
    """Return the scales of a box of a weight. Raises `ConfigError` if the box begins or ends within a block."""
    ends = zip(piece.offset, piece.at[-2:], piece.shape, whole, block, strict=True)
    if any(low % n or at % n or (size % n and low + size != all_of) for low, at, size, all_of, n in ends):
        raise ConfigError(f"{piece.tensor} is cut within a block of {block[0]} x {block[1]}", hint="another tp_size")
    rows, columns = block
    offset = (piece.offset[0] // rows, piece.offset[1] // columns)
    at = (*piece.at[:-2], piece.at[-2] // rows, piece.at[-1] // columns)
    return Slice(piece.tensor + SCALE, offset, _blocks(piece.shape, block), piece.param + SCALE, at)


def _mlp(tensors: dict[str, Shape], prefix: str, hidden: int, inner: int) -> None:
    tensors[f"{prefix}.gate_proj.weight"] = (inner, hidden)
    tensors[f"{prefix}.up_proj.weight"] = (inner, hidden)
    tensors[f"{prefix}.down_proj.weight"] = (hidden, inner)


def _rank_slices(config: ModelConfig, tp_size: int, tp_rank: int, params: dict[str, Shape]) -> Iterator[Slice]:
    """Yield every box of the rank, and add the parameters that hold them to `params`."""
    hidden, dim = config.hidden_size, config.head_dim

    def whole(name: str, shape: Shape) -> Slice:
        params[name] = shape
        return Slice(name, (0,) * len(shape), shape, name, (0,) * len(shape))

    def vocab(name: str) -> Slice:
        rows = -(-config.vocab_size // tp_size)
        first = min(tp_rank * rows, config.vocab_size)
        params[name] = (rows, hidden)
        return Slice(name, (first, 0), (min(rows, config.vocab_size - first), hidden), name, (0, 0))

    def mlp(prefix: str, inner: int, column: str, row: str, stack: Shape) -> Iterator[Slice]:
        part = inner // tp_size
        box, first = (part, hidden), tp_rank * part
        yield Slice(f"{prefix}.gate_proj.weight", (first, 0), box, column, (*stack, 0, 0))
        yield Slice(f"{prefix}.up_proj.weight", (first, 0), box, column, (*stack, part, 0))
        yield Slice(f"{prefix}.down_proj.weight", (0, first), (hidden, part), row, (*stack, 0, 0))

    queries = config.num_attention_heads // tp_size * dim
    heads = config.num_key_value_heads
    keys = max(heads // tp_size, 1) * dim
    first_key = tp_rank * keys if heads >= tp_size else tp_rank // (tp_size // heads) * dim

    yield vocab(EMBED)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        qkv, out = f"{attention}.qkv_proj.weight", f"{attention}.o_proj.weight"
        params[qkv] = (queries + 2 * keys, hidden)
        params[out] = (hidden, queries)
        yield Slice(f"{attention}.q_proj.weight", (tp_rank * queries, 0), (queries, hidden), qkv, (0, 0))
        yield Slice(f"{attention}.k_proj.weight", (first_key, 0), (keys, hidden), qkv, (queries, 0))
        yield Slice(f"{attention}.v_proj.weight", (first_key, 0), (keys, hidden), qkv, (queries + keys, 0))
        yield Slice(out, (0, tp_rank * queries), (hidden, queries), out, (0, 0))
        yield whole(f"{attention}.q_norm.weight", (dim,))
        yield whole(f"{attention}.k_norm.weight", (dim,))
        if config.sparse(layer):
            part = config.moe_intermediate_size // tp_size
            w13, w2 = f"{prefix}.mlp.experts.w13.weight", f"{prefix}.mlp.experts.w2.weight"
            yield whole(f"{prefix}.mlp.gate.weight", (config.num_experts, hidden))
            params[w13] = (config.num_experts, 2 * part, hidden)
            params[w2] = (config.num_experts, hidden, part)
            for expert in range(config.num_experts):
                yield from mlp(f"{prefix}.mlp.experts.{expert}", config.moe_intermediate_size, w13, w2, (expert,))
        else:
            part = config.intermediate_size // tp_size
            gate_up, down = f"{prefix}.mlp.gate_up_proj.weight", f"{prefix}.mlp.down_proj.weight"
            params[gate_up] = (2 * part, hidden)
            params[down] = (hidden, part)
            yield from mlp(f"{prefix}.mlp", config.intermediate_size, gate_up, down, ())
        yield whole(f"{prefix}.input_layernorm.weight", (hidden,))
        yield whole(f"{prefix}.post_attention_layernorm.weight", (hidden,))
    yield whole("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield vocab(HEAD)
