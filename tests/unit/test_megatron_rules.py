"""What a Megatron parameter is declared as, and what is refused by name. Needs no megatron-core."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from weightsync.errors import SourceError
from weightsync.sources import MegatronSource, Part
from weightsync.sources.megatron import QKV, Columns, Gated, Held, Norm, Rows, Vocabulary, Whole

CONFIG = SimpleNamespace(
    num_attention_heads=4, num_query_groups=2, kv_channels=2, hidden_size=3, gated_linear_unit=True
)


def held(rows: int, *, rank: int = 0, world: int = 1, width: int = 3, **more: Any) -> Held:
    data = torch.arange(rows * width).reshape(rows, width).float()
    given: dict[str, Any] = {
        "key": "k",
        "where": "w",
        "data": data,
        "config": CONFIG,
        "rank": rank,
        "world": world,
        "layer": 5,
    }
    return Held(**(given | more))


def boxes(parts: list[Part]) -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    return [(p.name, p.shape, p.offset, tuple(p.data.shape)) for p in parts]


def test_linear_layers_are_cut_along_their_outputs_or_inputs():
    assert boxes(Columns("m.{layer}.c")(held(4, rank=1, world=2))) == [("m.5.c", (8, 3), (4, 0), (4, 3))]
    assert boxes(Rows("r")(held(4, rank=1, world=2))) == [("r", (4, 6), (0, 3), (4, 3))]
    assert boxes(Whole("w")(held(4, rank=1, world=2))) == [("w", (4, 3), (0, 0), (4, 3))]


def test_query_groups_lie_one_behind_another():
    queries, keys, values = (4, 2, 2), (2, 2, 2), (2, 2, 2)
    parts = QKV("q", "k", "v")(held(16))
    assert [(p.name, p.offset[0], len(p.data), int(p.data[0, 0])) for p in parts] == [
        ("q", 0, queries[0], 0),
        ("k", 0, keys[0], 4 * 3),
        ("v", 0, values[0], 6 * 3),
        ("q", 4, 4, 8 * 3),
        ("k", 2, 2, 12 * 3),
        ("v", 2, 2, 14 * 3),
    ]
    assert {p.name: p.shape for p in parts} == {"q": (8, 3), "k": (4, 3), "v": (4, 3)}


def test_with_more_ranks_than_query_groups_each_has_some_rows_of_one():
    found = [boxes(QKV("q", "k", "v")(held(4, rank=rank, world=4))) for rank in range(4)]
    assert [[(name, offset[0], shape[0]) for name, _, offset, shape in one] for one in found] == [
        [("q", 0, 4)],
        [("k", 0, 2), ("v", 0, 2)],
        [("q", 4, 4)],
        [("k", 2, 2), ("v", 2, 2)],
    ]


def test_gates_come_before_ups_on_each_rank():
    gate, up = Gated("gate", "{expert}.up")(held(4, rank=1, world=2, expert=9))
    assert boxes([gate, up]) == [("gate", (4, 3), (2, 0), (2, 3)), ("9.up", (4, 3), (2, 0), (2, 3))]
    assert int(up.data[0, 0]) == 6


@pytest.mark.parametrize(("rank", "start", "rows"), [(0, 0, 4), (1, 4, 1), (2, 5, 0)])
def test_rows_that_pad_the_vocabulary_are_left_out(rank, start, rows):
    found = boxes(Vocabulary("e")(held(4, rank=rank, world=3, vocab_size=5)))
    assert found == [("e", (5, 3), (start, 0), (rows, 3))]


@pytest.mark.parametrize(
    ("rule", "given", "config", "problem"),
    [
        (QKV("q", "k", "v"), held(15), {}, "4 heads of 2 in 2 groups make 16 rows, and 1 ranks have 15 each"),
        (QKV("q", "k", "v"), held(16), {"rotary_interleaved": True}, "config.rotary_interleaved"),
        (QKV("q", "k", "v"), held(16), {"attention_output_gate": True}, "config.attention_output_gate"),
        (Gated("g", "u"), held(3), {}, "an even number of rows"),
        (Gated("g", "u"), held(4), {"gated_linear_unit": False}, "config.gated_linear_unit is False"),
        (Gated("g", "u"), held(4), {"moe_mlp_glu_interleave_size": 8}, "moe_mlp_glu_interleave_size"),
        (Norm("n"), held(4), {"layernorm_zero_centered_gamma": True}, "one less than the checkpoint's"),
        (Vocabulary("e"), held(4), {}, "how many of its rows pad the vocabulary is not known"),
        (Vocabulary("e"), held(4, vocab_size=9), {}, "have 4 rows, a vocabulary of 9 has more"),
        (Rows("r"), held(4, data=torch.zeros(4)), {}, "cut along dimension 1"),
        (Whole("m.{expert}"), held(4), {}, "what is to stand there for 'expert' is not known"),
        (Whole("m.{block}"), held(4), {}, "what is to stand there for 'block' is not known"),
    ],
)
def test_what_is_not_as_its_rule_says_is_named(rule, given, config, problem):
    given = Held(**{**vars(given), "config": SimpleNamespace(**{**vars(CONFIG), **config})})
    with pytest.raises(SourceError, match="Megatron parameter 'w' of shape") as error:
        rule(given)
    assert problem in str(error.value)


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.config = CONFIG
        self.mlp = nn.Module()
        self.mlp.linear_fc1 = nn.Linear(3, 4, bias=False)
        self.mlp.linear_fc2 = nn.Linear(2, 3, bias=False)


class Model(nn.Module):
    """The one layer of a pipeline stage, of 2 tensor-parallel ranks, as far as a source looks at it."""

    def __init__(self, *, number: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.config = CONFIG
        self.share_embeddings_and_output_weights, self.pre_process = tied, True
        group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
        self.pg_collection = SimpleNamespace(tp=group, expt_tp=group)
        self.embedding = nn.Module()
        self.embedding.word_embeddings = nn.Embedding(4, 3)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([Layer(number)])

    @property
    def layer(self) -> Any:
        layers: Any = self.decoder.layers
        return layers[0]


FACTS = {"model_type": "llama", "vocab_size": 7}
DOWN = "model.layers.2.mlp.down_proj.weight"


def test_layers_are_counted_over_the_whole_pipeline():
    source = MegatronSource(Model(), FACTS)
    layout = source.layout()
    assert layout.tensors.names == (
        "model.embed_tokens.weight",
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        DOWN,
    )
    assert [layout.shard(i).offset for i in range(4)] == [(4, 0), (2, 0), (2, 0), (0, 2)]
    assert layout.shard(0).shape == (3, 3)
    assert source.gathered == ()


def test_wrappers_and_virtual_stages():
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module.module = Model(number=1)
    later = Model(number=5)
    del later.embedding
    names = MegatronSource([wrapped, later], FACTS).layout().tensors.names
    assert [name.split(".")[2] for name in names[1:]] == ["0"] * 3 + ["4"] * 3


def test_a_checkpoint_directory_says_family_and_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FACTS))
    model = Model()
    assert MegatronSource(model, tmp_path).layout() == MegatronSource(model, FACTS).layout()
    assert MegatronSource(model, family="qwen3", vocab_size=7).layout() == MegatronSource(model, FACTS).layout()


def test_tied_weights_are_sent_once():
    model = Model(tied=True)
    assert MegatronSource(model, FACTS).layout().tensors.aliases == (("lm_head.weight", "model.embed_tokens.weight"),)
    with pytest.raises(SourceError, match=r"tie_word_embeddings = False.*share_embeddings_and_output_weights = True"):
        MegatronSource(model, FACTS | {"tie_word_embeddings": False})


def test_own_rules_come_before_the_family_s():
    def transposed(held: Held) -> list[Part]:
        return [Part(held.named("t.{layer}"), (2, 3), (0, 0), held.data.t())]

    rules = {"decoder.layers.*.mlp.linear_fc2.weight": transposed, "embedding.word_embeddings.weight": None}
    model = Model()
    source = MegatronSource(model, FACTS, rules=rules)
    layout = source.layout()
    assert "model.embed_tokens.weight" not in layout.tensors.names
    weight = model.layer.mlp.linear_fc2.weight
    assert torch.equal(source.local(2), weight.t())
    with torch.no_grad():
        weight.data = torch.rand(3, 2)
    again = MegatronSource(model, FACTS, rules=dict(rules))
    assert again.layout() is layout
    assert torch.equal(again.local(2), weight.t())
    assert again.local(2).data_ptr() == weight.data_ptr()


def test_a_rule_whose_name_fits_several_parameters_is_refused():
    """One layer's weights, or one expert's, would be sent as all of theirs."""
    rules = {"decoder.layers.*.mlp.linear_fc2.weight": Rows("model.down_proj.weight")}
    with pytest.raises(SourceError, match=r"'model\.down_proj\.weight'.*given twice") as caught:
        MegatronSource(
            [Model(number=1), Model(number=2)], FACTS, rules=rules | {"embedding.word_embeddings.weight": None}
        )
    assert "{layer}" in str(caught.value)

    model = Model()
    layer = model.layer
    layer.mlp.experts = nn.Module()
    layer.mlp.experts.linear_fc2 = nn.Module()
    layer.mlp.local_expert_indices = (4, 5)
    for i in range(2):
        layer.mlp.experts.linear_fc2.register_parameter(f"weight{i}", nn.Parameter(torch.rand(3, 2)))
    key = "decoder.layers.*.mlp.experts.linear_fc2.weight"
    with pytest.raises(SourceError, match=r"'layers\.2\.down'.*given twice") as caught:
        MegatronSource(model, FACTS, rules={key: Rows("layers.{layer}.down")})
    assert "{expert}" in str(caught.value)
    names = MegatronSource(model, FACTS, rules={key: Rows("{layer}.{expert}.down")}).layout().tensors.names
    assert names[-2:] == ("2.4.down", "2.5.down")


def test_a_rule_that_copies_is_asked_each_time():
    doubled = {"decoder.layers.*.mlp.linear_fc2.weight": lambda held: Rows(DOWN)(_with(held, held.data * 2))}
    model = Model()
    for _ in range(2):
        source = MegatronSource(model, FACTS, rules=doubled)
        assert torch.equal(source.local(3), model.layer.mlp.linear_fc2.weight * 2)
        with torch.no_grad():
            model.layer.mlp.linear_fc2.weight += 1


def _with(held: Held, data: torch.Tensor) -> Held:
    return Held(**{**vars(held), "data": data})


def test_what_has_changed_is_described_anew():
    model = Model()
    before = MegatronSource(model, FACTS).layout()
    assert MegatronSource(model, FACTS).layout() is before
    assert MegatronSource(model, FACTS | {"vocab_size": 8}).layout() != before
    assert MegatronSource(Model(), FACTS).layout() is not before, "another module may stand elsewhere"
    model.to(torch.bfloat16)
    assert MegatronSource(model, FACTS).layout() != before
    model.to(torch.float32)
    assert MegatronSource(model, FACTS).layout() == before
    model.layer.mlp.linear_fc2 = nn.Linear(4, 3, bias=False)
    assert MegatronSource(model, FACTS).layout() != before


def test_routers_biases_are_weights_though_buffers():
    model = Model()
    model.config = SimpleNamespace(**vars(CONFIG), moe_router_enable_expert_bias=True)
    model.layer.mlp.router = nn.Module()
    model.layer.mlp.router.register_buffer("expert_bias", torch.ones(4))
    name = "decoder.layers.*.mlp.router.expert_bias"
    with pytest.raises(SourceError, match=r"'decoder\.layers\.0\.mlp\.router\.expert_bias'"):
        MegatronSource(model, FACTS)
    source = MegatronSource(model, FACTS, rules={name: Whole("model.layers.{layer}.mlp.gate.e_score_correction_bias")})
    assert source.layout().tensors.names[-1] == "model.layers.2.mlp.gate.e_score_correction_bias"
    assert torch.equal(source.local(4), torch.ones(4))


def test_nothing_remembered_keeps_weights_alive():
    model = Model()
    MegatronSource(model, FACTS)
    storage = model.layer.mlp.linear_fc1.weight.untyped_storage()
    held_by = storage._weak_ref()
    model.layer.mlp.linear_fc1.weight.data = torch.zeros(4, 3)
    del storage
    assert torch.UntypedStorage._expired(held_by)
    torch.UntypedStorage._free_weak_ref(held_by)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"checkpoint": {"model_type": "gemma9"}}, "no table says where the parameters of a Megatron 'gemma9' lie"),
        ({"checkpoint": {"vocab_size": 7}}, "the model's family is not known"),
        ({"checkpoint": "/nowhere"}, "cannot read /nowhere/config.json"),
        ({"checkpoint": {"model_type": "llama"}}, "'embedding.word_embeddings.weight' of shape (4, 3): how many"),
        ({"rules": {"decoder.layers.*.mlp.linear_fc2.weight": lambda _: [3]}}, "its rule gave int, not weightsync"),
        ({"rules": {"decoder.layers.*.mlp.linear_fc2.weight": lambda _: 3}}, "its rule gave int, not parts"),
        ({"family": "lama"}, "there are tables of llama, mistral"),
        ({"checkpoint": {"model_type": "new"}, "rules": {}}, "no rule says where Megatron parameter 'embedding.word"),
        ({"bridge": object(), "rules": {}, "checkpoint": {"model_type": "new"}}, "is no bridge of mbridge"),
    ],
)
def test_what_is_missing_is_said(options, problem):
    with pytest.raises(SourceError) as error:
        MegatronSource(Model(), **({"checkpoint": FACTS} | options))
    assert problem in str(error.value)


def test_an_unknown_parameter_is_named_with_the_rule_that_is_missing():
    model = Model()
    model.layer.mlp.adapter = nn.Linear(1, 1, bias=False)
    with pytest.raises(SourceError, match=r"'decoder\.layers\.0\.mlp\.adapter\.weight'") as error:
        MegatronSource(model, FACTS)
    assert "rules={'decoder.layers.*.mlp.adapter.weight': Columns('model.layers.{layer}.….weight')}" in str(error.value)
    del model.layer.mlp.adapter
    model.mtp = nn.Linear(1, 1)
    with pytest.raises(SourceError, match="multi-token prediction"):
        MegatronSource(model, FACTS)


def test_what_is_no_megatron_model_is_refused():
    with pytest.raises(SourceError, match="Linear is no language model of megatron-core"):
        MegatronSource(nn.Linear(1, 1), FACTS)
    with pytest.raises(SourceError, match="no model is given"):
        MegatronSource([], FACTS)
    wrapped = type("TorchFullyShardedDataParallel", (nn.Module,), {})()
    wrapped.module = Model()
    with pytest.raises(SourceError, match="TorchFullyShardedDataParallel: FSDP cuts"):
        MegatronSource(wrapped, FACTS)
    offloaded = Model()
    offloaded.layer.mlp.linear_fc1.weight.untyped_storage().resize_(0)
    with pytest.raises(SourceError, match=r"linear_fc1\.weight' has no memory on this rank"):
        MegatronSource(offloaded, FACTS)


class Quantised(torch.Tensor):
    """A tensor that is made of others, as Transformer Engine's fp8 parameters are."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is computed with it")


def test_parameters_without_memory_of_their_own_are_refused():
    model = Model()
    weight = torch.Tensor._make_wrapper_subclass(Quantised, (3, 2))
    model.layer.mlp.linear_fc2._parameters["weight"] = weight
    with pytest.raises(SourceError, match=r"linear_fc2\.weight' is a Quantised"):
        MegatronSource(model, FACTS)


class DDP(nn.Module):
    """Megatron's, as far as a source looks at it."""

    def __init__(self, model: nn.Module, *, overlap: bool) -> None:
        super().__init__()
        self.module = model
        self.ddp_config = SimpleNamespace(use_distributed_optimizer=True, overlap_param_gather=overlap)
        self.synced = 0

    def start_param_sync(self, *, force_sync: bool) -> None:
        assert force_sync
        self.synced += 1


@pytest.mark.parametrize("overlap", [False, True])
def test_parameters_that_are_gathered_late_are_asked_for_at_each_push(overlap):
    wrapped = DDP(Model(), overlap=overlap)
    outermost = nn.Module()
    outermost.module = wrapped
    for pushes in (1, 2):
        MegatronSource(outermost, FACTS)
        assert wrapped.synced == (pushes if overlap else 0)


class Bridge:
    """An mbridge bridge as far as one rank looks at it."""

    def _weight_name_mapping_mcore_local_to_global(self, model: nn.Module) -> dict[str, str]:
        return {name: name.replace("layers.0", "layers.2") for name, _ in model.named_parameters()}

    def _weight_merge_across_tp(self, *_: Any) -> torch.Tensor:
        raise AssertionError("nothing here is marked as cut")

    def _weight_to_hf_format(self, name: str, data: torch.Tensor) -> tuple[list[str], list[torch.Tensor]]:
        return [name.replace("decoder", "exported")], [data + 1]


def test_what_a_bridge_exports_is_made_again_for_each_push_and_said(caplog):
    model = Model()
    model.layer.extra = nn.Linear(2, 1, bias=False)
    with caplog.at_level(logging.WARNING):
        first = MegatronSource(model, FACTS, bridge=Bridge())
    assert first.gathered == ("exported.layers.2.extra.weight",)
    assert "1 checkpoint tensors are gathered by Bridge" in caplog.text
    weight = model.layer.extra.weight
    with torch.no_grad():
        weight += 1
    again = MegatronSource(model, FACTS, bridge=Bridge())
    assert again.layout() is first.layout()
    assert torch.equal(again.local(4), weight + 1)
    with pytest.raises(SourceError, match="no rule says where"):
        MegatronSource(model, FACTS)
