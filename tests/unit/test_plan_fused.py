"""Fused groups, layers, and the order in which tensors travel."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from weightsync.plan.fused import canonical_order, group_key, layer_key, natural_key


def ordered(names: list[str]) -> list[list[str]]:
    """The names in canonical order, group by group."""
    order, begins = canonical_order(names)
    bounds = [*begins.tolist(), len(names)]
    return [[names[i] for i in order[a:b]] for a, b in pairwise(bounds)]


@pytest.mark.parametrize(
    "together",
    [
        [f"model.layers.3.self_attn.{p}_proj.{leaf}" for p in "qkv" for leaf in ("weight", "bias", "weight_scale_inv")],
        [f"l.0.attn.{p}_proj.base_layer.weight" for p in "qkv"],
        [f"l.0.attn.{p}_proj" for p in "qkv"],
        [f"l.0.attention.{p}.weight" for p in ("wq", "wk", "wv")],
        [f"bert.encoder.layer.1.attention.self.{p}.weight" for p in ("query", "key", "value")],
        [f"l.0.self_attn.{p}.weight" for p in ("q_a_proj", "kv_a_proj_with_mqa")],
        [f"l.0.mlp.{p}_proj.weight" for p in ("gate", "up")],
        [f"l.0.mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up")],
        [f"l.0.feed_forward.{p}.weight" for p in ("w1", "w3")],
        [f"l.0.mlp.experts.12.{p}_proj.{leaf}" for p in ("gate", "up", "down") for leaf in ("weight", "weight_scale")],
        [f"l.0.block_sparse_moe.experts.7.{p}.weight" for p in ("w1", "w2", "w3")],
        [f"l.0.linear_attn.{p}.weight" for p in ("in_proj_qkvz", "in_proj_ba")],
        [f"l.0.linear_attn.{p}.weight" for p in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")],
    ],
)
def test_fused_tensors_share_a_group(together):
    assert len({group_key(name) for name in together}) == 1
    assert group_key(together[0]) not in together


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("l.0.attn.q_proj.weight", "l.1.attn.k_proj.weight"),  # layers
        ("l.0.attn.q_proj.weight", "l.0.cross.k_proj.weight"),  # modules
        ("l.0.attn.q_proj.weight", "l.0.attn.o_proj.weight"),
        ("l.0.mlp.gate_proj.weight", "l.0.mlp.down_proj.weight"),
        ("l.0.mlp.experts.1.gate_proj.weight", "l.0.mlp.experts.11.gate_proj.weight"),
        ("l.0.mlp.experts.gate_up_proj", "l.0.mlp.experts.down_proj"),  # stacked already
        ("l.0.mlp.w1.weight", "l.0.mlp.w2.weight"),
        ("q_proj.l.0.a.weight", "k_proj.l.0.a.weight"),  # not a fused module's place in a name
    ],
)
def test_others_do_not(one, other):
    assert group_key(one) != group_key(other)


def test_most_tensors_are_on_their_own():
    for name in ("model.norm.weight", "lm_head.weight", "x", "l.0.self_attn.q_norm.weight", "l.0.mlp.gate.weight"):
        assert group_key(name) == name


def test_natural_order_compares_numbers():
    names = ["a.10", "a.9.z", "a.9", "a.010", "a.1e9", "a.b", "a", "b.2x10", "b.2x9", "a.100000000000000000000"]
    assert sorted(names, key=natural_key) == [
        "a",
        "a.1e9",
        "a.9",
        "a.9.z",
        "a.10",
        "a.010",
        "a.100000000000000000000",
        "a.b",
        "b.2x9",
        "b.2x10",
    ]


def test_natural_order_never_ties():
    names = ["a1", "a01", "a001", "a1.b", "a01.b", "a.1", "a.01", "a1b01", "a01b1"]
    assert len({natural_key(name) for name in names}) == len(names)


def test_canonical_order_follows_layers_and_keeps_groups():
    names = [
        *(f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (10, 9) for p in "qkvo"),
        "model.embed_tokens.weight",
        "model.layers.9.self_attn.q_norm.weight",
        "lm_head.weight",
    ]
    expected = [
        ["lm_head.weight"],
        ["model.embed_tokens.weight"],
        [f"model.layers.9.self_attn.{p}_proj.weight" for p in "kqv"],
        ["model.layers.9.self_attn.o_proj.weight"],
        ["model.layers.9.self_attn.q_norm.weight"],
        [f"model.layers.10.self_attn.{p}_proj.weight" for p in "kqv"],
        ["model.layers.10.self_attn.o_proj.weight"],
    ]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert ordered(names) == expected
    assert ordered([]) == []


def test_layers():
    assert layer_key("model.layers.12.mlp.experts.3.w1.weight") == "model.layers.12"
    assert layer_key("model.embed_tokens.weight") == "model.embed_tokens"
    assert layer_key("x") == ""
