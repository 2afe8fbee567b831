"""Weights sent as float8 with scales: bit for bit what engines make of them, whoever holds which part."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.engines import fp8_oracle
from tests.quantise_kit import quantised_whole, sent, tensors_of
from tests.unit.sources_kit import put_together, raw, run_ranks
from weightsync.errors import SourceError
from weightsync.sources import CheckpointSource, Fp8, Part, PartSource, source_of
from weightsync.sources.quantised import QuantisedSource, quantised

ENGINES = json.loads((Path(__file__).parents[1] / "fixtures/engines/fp8.json").read_text())
SMALL = (4, 3)


def model() -> dict[str, torch.Tensor]:
    rand = torch.Generator().manual_seed(1)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rand).bfloat16()

    return {
        "model.embed_tokens.weight": made(9, 8),
        "model.layers.0.self_attn.q_proj.weight": made(8, 8),
        "model.layers.0.self_attn.q_proj.bias": made(8),
        "model.layers.0.input_layernorm.weight": made(8),
        "model.layers.0.mlp.gate.weight": made(2, 8),
        "model.layers.0.mlp.experts.1.down_proj.weight": made(7, 10),
        "model.layers.0.mlp.experts.gate_up_proj": made(2, 9, 5),
        "lm_head.weight": made(9, 8),
    }


MATRICES = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.experts.1.down_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
]


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert raw(found[name]).tolist() == raw(tensor).tolist(), name


# --- the engines' own functions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "how", "recipe"),
    [
        ("vllm", "block", Fp8()),
        ("vllm", "block ue8m0", Fp8(ue8m0=True)),
        ("vllm", "tensor", Fp8(None)),
        ("sglang", "block ue8m0", Fp8(ue8m0=True)),
    ],
)
def test_elements_and_scales_are_the_engines_bit_for_bit(engine, how, recipe):
    """Against what they said when `tests/engines/fp8_oracle.py` ran in their interpreters."""
    wanted = ENGINES[engine][how]
    found = {}
    for name, weight in fp8_oracle.weights().items():
        found[name] = [fp8_oracle.digest(tensor) for tensor in sent({"x.weight": weight}, recipe).values()]
    assert len(found) == 18
    assert found == wanted


def test_sglangs_scale_of_a_tensor_is_this_to_the_last_bit_but_one():
    """It divides 448 by the amax and takes the reciprocal: rounded twice. Of bfloat16 weights it is the same."""
    for name, weight in fp8_oracle.weights().items():
        scale = sent({"x.weight": weight}, Fp8(None))["x.weight_scale"]
        off = scale.view(torch.int32).item() - ENGINES["sglang"]["tensor scales"][name]
        assert abs(off) <= (1 if name.endswith("float32") else 0), name


# --- what is quantised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [SMALL, None], ids=["blocks", "one scale"])
def test_matrices_are_quantised_and_what_engines_have_no_fp8_layer_for_is_not(block):
    check(sent(model(), Fp8(block)), quantised_whole(model(), MATRICES, block))


def test_what_to_keep_is_said_by_module_name_or_pattern():
    keep = ("model.layers.0.self_attn", "*experts.1", "*.gate", "lm_head", "model.embed*")
    check(sent(model(), Fp8(SMALL, keep)), quantised_whole(model(), MATRICES[2:], SMALL))
    found = sent(model(), Fp8(SMALL, "lm_head"))  # type: ignore[arg-type]
    assert "lm_head.weight_scale_inv" not in found
    assert found["model.layers.0.mlp.gate.weight_scale_inv"].shape == (1, 3)


def test_a_tied_tensor_is_kept_if_one_of_its_names_is_and_else_its_scales_are_tied_too():
    tied = {"a.weight": torch.randn(4, 6), "norm.weight": torch.ones(3)}
    tied["b.weight"] = tied["a.weight"]
    layout = quantised(source_of(tied), Fp8(SMALL)).layout()
    assert layout.tensors.aliases == (("b.weight", "a.weight"), ("b.weight_scale_inv", "a.weight_scale_inv"))
    with pytest.raises(SourceError, match="float8 of none of the 3 tensors"):
        quantised(source_of(tied, "bfloat16"), Fp8(SMALL, ("b",)))


@pytest.mark.parametrize(
    "some", [{"only": "*norm*"}, {"only": str.isascii, "rename": lambda name: f"{name}.norm"}], ids=["only", "rename"]
)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_makes_float8_of_nothing_that_was_chosen_is_refused(some, dtype):
    weights = {"a.norm.weight": torch.ones(4, 4)} | ({} if "rename" in some else {"b.weight": torch.ones(4, 4)})
    with pytest.raises(SourceError, match="float8 of none of the 1 tensors") as refused:
        quantised(source_of(weights, dtype, **some), Fp8(SMALL))
    assert ("'a.norm.weight.norm'" if "rename" in some else "'a.norm.weight'") in str(refused.value.hint)


def test_names_and_types_are_what_rename_and_dtype_make_of_them():
    weights = {"m.a.weight": torch.randn(5, 7), "m.b.bias": torch.randn(5)}
    found = sent(weights, Fp8(SMALL), dtype="bfloat16", rename=lambda name: name.removeprefix("m."))
    rounded = {name.removeprefix("m."): tensor.bfloat16() for name, tensor in weights.items()}
    check(found, quantised_whole(rounded, ["a.weight"], SMALL))
    with pytest.raises(SourceError, match=r"'a.weight' is float64") as refused:
        sent({"a.weight": torch.zeros(2, 2, dtype=torch.float64)}, Fp8())
    assert "dtype=" in str(refused.value.hint)


def test_what_is_float8_already_stays():
    there = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    found = sent({**there, "b.weight": torch.ones(2, 2)}, Fp8())
    check(found, quantised_whole({**there, "b.weight": torch.ones(2, 2)}, ["b.weight"], (128, 128)))


@pytest.mark.parametrize("block", [0, (128,), (0, 4), "128", (128, 128.0)])
def test_a_block_that_is_none_is_refused(block):
    with pytest.raises(SourceError, match="is no block"):
        Fp8(block)


def test_what_says_nothing_about_how_is_refused():
    with pytest.raises(SourceError, match="says nothing about how"):
        quantised(source_of(model()), True)  # type: ignore[arg-type]


# --- like a checkpoint ------------------------------------------------------------------------------------------------


def fp8_checkpoint(directory, block, names=tuple(MATRICES), scales="float32", shape=None, **config):
    found = quantised_whole(model(), names, block)
    if shape is not None:
        found = {name: t.reshape(shape) if name.endswith("_scale") else t for name, t in found.items()}
    dtype = getattr(torch, scales)
    save_file({n: t.to(dtype) if "_scale" in n else t for n, t in found.items()}, directory / "model.safetensors")
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block), **config}
    (directory / "config.json").write_text(json.dumps({"quantization_config": said}))
    return str(directory)


@pytest.mark.parametrize("block", [SMALL, None], ids=["blocks", "one scale"])
def test_what_a_checkpoint_has_scales_for_is_quantised_and_nothing_else(tmp_path, block):
    some = ["model.embed_tokens.weight", MATRICES[1]]  # an odd choice, but that is what it is
    like = fp8_checkpoint(tmp_path, block, some, scales="bfloat16")
    check(sent(model(), like), quantised_whole(model(), some, block))
    recipe = Fp8.like(like)
    assert recipe == Fp8.like(tmp_path)
    assert hash(recipe) == hash(Fp8.like(tmp_path))
    source = source_of(model())
    assert quantised(source, recipe).layout() is quantised(source, Fp8.like(tmp_path)).layout()


def test_a_scale_may_have_no_dimensions(tmp_path):
    """As AutoFP8 wrote them; engines take both, and are sent what their checkpoint has."""
    like = fp8_checkpoint(tmp_path, None, MATRICES[:2], shape=())
    found = sent(model(), like)
    wanted = quantised_whole(model(), MATRICES[:2], None)
    check(found, {name: t.reshape(()) if name.endswith("_scale") else t for name, t in wanted.items()})
    name = MATRICES[0]
    halves = [Part(name, (8, 8), (at, 0), model()[name][at : at + 4]) for at in (0, 4)]
    layouts = [quantised(PartSource([half]), like).layout() for half in halves]
    assert [layout.tensors.names for layout in layouts] == [(name, f"{name}_scale"), (name,)]


def test_a_checkpoint_whose_scales_have_another_shape_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"scales of .* are \(1, 1\), and \(1,\) is known here"):
        Fp8.like(fp8_checkpoint(tmp_path, None, MATRICES[:1], shape=(1, 1)))


def test_a_checkpoint_of_powers_of_two(tmp_path):
    like = fp8_checkpoint(tmp_path, SMALL, scale_fmt="ue8m0")
    scales = [t for n, t in sent(model(), like).items() if n.endswith("_scale_inv")]
    assert len(scales) == len(MATRICES)
    assert all(torch.equal(t.log2(), t.log2().round()) for t in scales)


def test_a_checkpoint_without_the_tensor_or_with_another_shape_is_not_guessed_from(tmp_path):
    like = fp8_checkpoint(tmp_path, SMALL)
    with pytest.raises(SourceError, match=r"has no tensor 'policy\.lm_head\.weight'") as refused:
        sent({"policy.lm_head.weight": torch.ones(9, 8)}, like)
    assert "'lm_head.weight'" in str(refused.value.hint)
    with pytest.raises(SourceError, match=r"'lm_head.weight' is \(9, 9\), and \(9, 8\) in"):
        sent({"lm_head.weight": torch.ones(9, 9)}, like)
    tied = {"model.embed_tokens.weight": torch.ones(9, 8), MATRICES[0]: torch.ones(8, 8)}
    tied["head.weight"] = tied["model.embed_tokens.weight"]  # the checkpoint leaves that name out
    assert quantised(source_of(tied), like).layout().tensors.dtypes[0] == "float32"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq"}, "which is not known here"),
        ({"activation_scheme": "static"}, "which is not known here"),
        ({"scale_fmt": "e5"}, "which is not known here"),
        ({"weight_block_size": [4]}, r"weight_block_size = \[4\] in .*config\.json is no block"),
        ({"weight_block_size": 128}, r"weight_block_size = 128 in .*config\.json is no block"),
    ],
)
def test_a_checkpoint_quantised_otherwise_is_refused(tmp_path, config, words):
    with pytest.raises(SourceError, match=words) as refused:
        Fp8.like(fp8_checkpoint(tmp_path, SMALL, **config))
    assert ("a pair, such as [128, 128]" in str(refused.value)) == ("is no block" in words)


def test_a_checkpoint_that_is_not_quantised_is_refused(tmp_path):
    with pytest.raises(SourceError, match="cannot read"):
        Fp8.like(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="has no quantization_config"):
        Fp8.like(tmp_path)
    fp8_checkpoint(tmp_path, None, [])
    with pytest.raises(SourceError, match="no tensor with scales called `…_scale`"):
        Fp8.like(tmp_path)
    fp8_checkpoint(tmp_path, SMALL, scales="float8_e8m0fnu")
    with pytest.raises(SourceError, match="with scales of float8_e8m0fnu"):
        Fp8.like(tmp_path)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("block", [SMALL, None], ids=["blocks", "one scale"])
def test_what_is_no_number_is_refused_by_name(odd, block):
    weights = {"a.weight": torch.ones(9, 7), "b.weight": torch.ones(9, 7)}
    weights["b.weight"][5, 4] = float(odd)
    source = quantised(source_of(weights), Fp8(block))
    with pytest.raises(
        SourceError, match=r"'b.weight' has a NaN or an infinity, in block \[{}\]".format("1, 1" if block else "0, 0")
    ):
        source.measure()  # type: ignore[attr-defined]
    weights["b.weight"][5, 4] = 1.0
    source.measure()  # type: ignore[attr-defined]
    check(tensors_of(source), quantised_whole(weights, weights, block))


def test_a_float32_that_bfloat16_cannot_hold_is_refused():
    with pytest.raises(SourceError, match="NaN or an infinity"):
        sent({"a.weight": torch.full((2, 2), 3.4e38)}, Fp8(), dtype="bfloat16")


def test_it_is_not_read_before_it_was_measured_and_new_values_have_new_scales():
    weights = {"a.weight": torch.ones(3, 3)}
    source = quantised(source_of(weights), Fp8(SMALL))
    with pytest.raises(SourceError, match="before `measure`"):
        tensors_of(source)
    for _ in range(2):
        weights["a.weight"].mul_(7)
        source.measure()  # type: ignore[attr-defined]
        check(tensors_of(source), quantised_whole(weights, weights, SMALL))


def test_nothing_is_read_as_it_lies_but_what_stays():
    weights = {"a.weight": torch.ones(4, 3), "norm.weight": torch.ones(3)}
    source = quantised(source_of(weights), Fp8(SMALL))
    names = [source.layout().shard(i).name for i in range(3)]
    assert names == ["a.weight", "norm.weight", "a.weight_scale_inv"]
    assert [source.local(i) is None for i in range(3)] == [True, False, True]
    assert [source.box_bytes(i, (0,) * d, (1,) * d) is None for i, d in enumerate((2, 1, 2))] == [True, False, True]
    assert source.nbytes == 12 + 12 + 4
    with pytest.raises(ValueError, match="does not go into"):
        source.read_into(0, (0, 0), (4, 3), torch.empty(4, 3))


def test_a_checkpoint_on_disk_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("weightsync.sources.blocks._CHUNK", 40)
    save_file(model(), tmp_path / "model.safetensors")
    with CheckpointSource(tmp_path) as source:
        check(sent(source, Fp8(SMALL)), quantised_whole(model(), MATRICES, SMALL))


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_a_rank_with_part_of_a_block_says_whose_and_what_to_do():
    def part(rows: int, at: int = 0) -> QuantisedSource:
        parts = [Part("a.weight", (12, 6), (at, 0), torch.ones(rows, 6)), Part("b.bias", (3,), (0,), torch.ones(3))]
        source = quantised(PartSource(parts), Fp8(SMALL))
        assert isinstance(source, QuantisedSource)
        return source

    part(8).measure()  # ends where a block ends
    part(4, 8).measure()
    with pytest.raises(SourceError, match=r"'a.weight' .* blocks of 4 x 3 .* lie on several ranks") as refused:
        part(6).measure()
    assert "all_reduce=True" in str(refused.value.hint)
    whole = [Part("a.weight", (12, 6), (0, 0), torch.ones(5, 6)), Part("a.weight", (12, 6), (5, 0), torch.ones(7, 6))]
    quantised(PartSource(whole), Fp8(None)).measure()  # type: ignore[attr-defined]
    with pytest.raises(SourceError, match="other ranks have parts of it, and it has one scale"):
        quantised(PartSource(whole[:1]), Fp8(None)).measure()  # type: ignore[attr-defined]


@pytest.mark.timeout(150)
def test_ranks_that_share_blocks_send_what_one_would(tmp_path):
    run_ranks("quantise_ranks.py", str(tmp_path), torchrun=4)
    cases = {path.name.split(".")[0] for path in tmp_path.glob("*.layout")}
    assert cases == {"fsdp2", "hybrid", "aligned", "tensor", "tied", "fsdp1", "stages"}
    for case in sorted(cases):
        plan, layouts = put_together(tmp_path, case, 4)
        assert all(len(fill) for fill in plan.fills), case
        if case == "hybrid":  # replicas send a scale once
            assert sum(map(len, plan.fills)) < sum(map(len, layouts))


def test_adapters_are_merged_before():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        base = nn.Sequential(OrderedDict(up=nn.Linear(8, 12), down=nn.Linear(12, 8)))
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
        merged = dict(copy.deepcopy(adapted).merge_and_unload().state_dict())
    check(sent(adapted, Fp8(SMALL)), quantised_whole(merged, ["up.weight", "down.weight"], SMALL))
