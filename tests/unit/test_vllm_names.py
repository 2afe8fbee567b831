"""Which parameter takes which tensor, and which layers would stay half-loaded."""

from __future__ import annotations

import pytest

from weightsync.adapters.vllm.names import ModelNames

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0"
DENSE = [
    "model.embed_tokens.weight",
    f"{LAYER}.self_attn.qkv_proj.weight",
    f"{LAYER}.self_attn.qkv_proj.bias",
    f"{LAYER}.self_attn.o_proj.weight",
    f"{LAYER}.mlp.gate_up_proj.weight",
    f"{LAYER}.mlp.down_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
CHECKPOINT = [
    "model.embed_tokens.weight",
    *(f"{LAYER}.self_attn.{m}_proj.{leaf}" for m in "qkv" for leaf in ("weight", "bias")),
    f"{LAYER}.self_attn.o_proj.weight",
    *(f"{LAYER}.mlp.{m}_proj.weight" for m in ("gate", "up", "down")),
    "model.norm.weight",
]


def dense(**options):
    return ModelNames(DENSE, fused=FUSED, tied={"lm_head.weight": "model.embed_tokens.weight"}, **options)


def moe():
    stacked = [f"{LAYER}.mlp.experts.w13_weight", f"{LAYER}.mlp.experts.w2_weight"]
    return ModelNames(stacked, fused={}, experts=2)


def experts(*indices):
    return [f"{LAYER}.mlp.experts.{i}.{m}_proj.weight" for i in indices for m in ("gate", "up", "down")]


def test_a_whole_checkpoint_fits():
    assert dense().fit(CHECKPOINT) == ((), (), ())


def test_fused_members_go_into_the_fused_parameter():
    assert dense().parameter_of(f"{LAYER}.self_attn.k_proj.bias") == f"{LAYER}.self_attn.qkv_proj.bias"
    assert dense().parameter_of(f"{LAYER}.mlp.gate_up_proj.weight") == f"{LAYER}.mlp.gate_up_proj.weight"


def test_unknown_names_are_told():
    fit = dense().fit([*CHECKPOINT, "model.layers.9.self_attn.o_proj.weight", f"{LAYER}.mlp.extra.weight"])
    assert fit.unknown == ("model.layers.9.self_attn.o_proj.weight", f"{LAYER}.mlp.extra.weight")


def test_a_part_of_a_model_knows_no_unknown_names():
    assert dense().fit([*CHECKPOINT, "model.layers.9.self_attn.o_proj.weight"], whole=False).unknown == ()


def test_what_models_drop_is_not_unknown():
    assert dense().parameter_of("model.layers.0.self_attn.rotary_emb.inv_freq") == ""
    assert dense(rename=lambda name: None).parameter_of("anything") == ""


def test_a_renaming_model():
    names = dense(rename=lambda name: name.replace("transformer.", "model."))
    assert names.parameter_of("transformer.norm.weight") == "model.norm.weight"
    assert names.parameter_of("model.norm.weight") == "model.norm.weight"


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (f"{LAYER}.self_attn.v_proj.weight", "without v_proj of the same fused"),
        (f"{LAYER}.mlp.up_proj.weight", "without up_proj of the same fused"),
    ],
)
def test_parts_of_a_fused_parameter(missing, expected):
    fit = dense().fit([name for name in CHECKPOINT if name != missing])
    assert len(fit.partial) == 1
    assert expected in fit.partial[0]


def test_a_weight_without_its_bias():
    fit = dense().fit([name for name in CHECKPOINT if not name.endswith(".bias")])
    assert len(fit.partial) == 1
    assert "qkv_proj.bias" in fit.partial[0]


def test_whole_layers_may_be_left_alone():
    fit = dense().fit(["model.norm.weight"])
    assert fit.partial == ()
    assert f"{LAYER}.mlp.down_proj.weight" in fit.untouched
    assert "model.norm.weight" not in fit.untouched


def test_a_tied_parameter_is_touched_with_the_other():
    assert dense().fit(["model.embed_tokens.weight"]).untouched == tuple(DENSE[1:-1])
    assert dense().fit(["lm_head.weight"]).untouched == tuple(DENSE[1:-1])


def test_experts():
    assert moe().fit(experts(0, 1)) == ((), (), ())
    assert moe().parameter_of(experts(1)[2]) == f"{LAYER}.mlp.experts.w2_weight"
    assert moe().fit([f"{LAYER}.mlp.experts.0.other.weight"]).unknown


def test_some_of_the_experts():
    fit = moe().fit(experts(0))
    assert all("1 of 2 experts" in sentence for sentence in fit.partial)
    assert len(fit.partial) == 2


def test_experts_below_another_module():
    names = ModelNames([f"{LAYER}.mlp.experts.routed_experts.w13_weight"], fused={}, experts=1)
    assert names.parameter_of(experts(0)[0]) == f"{LAYER}.mlp.experts.routed_experts.w13_weight"
