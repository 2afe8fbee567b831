"""Every element of every checkpoint tensor lies in some rank; every rank's parameter is filled once."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.sharding import EMBED, HEAD, check_tp, checkpoint_tensors, rank_layout
from weightsync.errors import ConfigError


@st.composite
def configs(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model, and a number of ranks that can share it."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    heads = draw(st.sampled_from([count for count in (1, 2, 3, 4, 6, 8, 12) if count % tp == 0 or tp % count == 0]))
    moe = draw(st.booleans())
    config = ModelConfig(
        architecture="Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM",
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=tp * draw(st.integers(1, 3)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=math.lcm(tp, heads) * draw(st.integers(1, 2)),
        num_key_value_heads=heads,
        head_dim=draw(st.sampled_from([2, 4])),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=draw(st.integers(1, 4)) if moe else 0,
        num_experts_per_tok=1 if moe else 0,
        moe_intermediate_size=tp * draw(st.integers(1, 3)) if moe else 0,
        decoder_sparse_step=draw(st.integers(1, 2)),
    )
    return config, tp


@settings(deadline=None)
@given(configs())
def test_ranks_cover_every_tensor_and_fill_every_parameter_once(drawn: tuple[ModelConfig, int]) -> None:
    config, tp = drawn
    tensors = checkpoint_tensors(config)
    covered = {name: np.zeros(shape, dtype=int) for name, shape in tensors.items()}
    for rank in range(tp):
        layout = rank_layout(config, tp, rank)
        filled = {name: np.zeros(shape, dtype=int) for name, shape in layout.params.items()}
        for name, boxes in layout.slices.items():
            for box in boxes:
                assert box.tensor == name
                assert 0 not in box.shape
                source = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
                assert covered[name][source].shape == box.shape, "outside the tensor"
                covered[name][source] += 1
                stacked = len(box.at) - len(box.shape)
                place = tuple(slice(a, a + n) for a, n in zip(box.at[stacked:], box.shape, strict=True))
                target = filled[box.param][box.at[:stacked]] if stacked else filled[box.param]
                assert target[place].shape == box.shape, "outside the parameter"
                target[place] += 1
        for name, count in filled.items():
            if name in (EMBED, HEAD):
                assert count.max() <= 1  # the rest is padding
            else:
                assert (count == 1).all(), name
    for name, count in covered.items():
        copies = {int(n) for n in np.unique(count)}
        shared = name.endswith(("norm.weight", "layernorm.weight", "mlp.gate.weight"))
        if shared:
            assert copies == {tp}
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            assert copies == {max(1, tp // config.num_key_value_heads)}
        else:
            assert copies == {1}, name


BASE = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=2,
)


@pytest.mark.parametrize(
    ("change", "tp", "words"),
    [
        ({}, 0, "tp_size"),
        ({}, 5, "num_attention_heads"),
        ({"intermediate_size": 10}, 4, "intermediate_size"),
        ({"num_key_value_heads": 4}, 6, "num_key_value_heads"),
    ],
)
def test_what_cannot_be_shared_is_named(change: dict[str, int], tp: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_tp(msgspec.structs.replace(BASE, **change), tp)


def test_neighbours_hold_the_same_key_head_when_there_are_fewer_heads_than_ranks() -> None:
    config = msgspec.structs.replace(BASE, num_key_value_heads=2, num_attention_heads=8)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert [rank_layout(config, 4, rank).slices[key][0].offset[0] for rank in range(4)] == [0, 0, 2, 2]


def test_a_rank_beyond_the_vocabulary_holds_padding_only() -> None:
    config = msgspec.structs.replace(BASE, vocab_size=3)
    held = [rank_layout(config, 4, rank).slices.get(EMBED) for rank in range(4)]
    assert [None if boxes is None else boxes[0].shape for boxes in held] == [(1, 8), (1, 8), (1, 8), None]
    config = msgspec.structs.replace(BASE, vocab_size=5)
    held = [rank_layout(config, 4, rank).slices.get(EMBED) for rank in range(4)]
    assert [None if boxes is None else boxes[0].shape for boxes in held] == [(2, 8), (2, 8), (1, 8), None]


def test_a_tied_head_is_no_tensor() -> None:
    tied = msgspec.structs.replace(BASE, tie_word_embeddings=True)
    assert HEAD in checkpoint_tensors(BASE)
    assert HEAD not in checkpoint_tensors(tied)
    assert HEAD not in rank_layout(tied, 2, 0).params
