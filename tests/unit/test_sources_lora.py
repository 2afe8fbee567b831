"""Modules with adapters of the real peft: what is sent is what peft itself would merge, and nothing is changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from weightsync.errors import SourceError
from weightsync.sources import LoraSource, ModuleSource, source_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)


class Model(nn.Module):
    """Linear layers, one the other way round (GPT-2's), an embedding, a head, and what nobody adapts."""

    def __init__(self, width: int = 24, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.mixed = Conv1D(2 * width, width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"gate": torch.rand(3, 4, 5)})


def adapted(model: nn.Module | None = None, *, dtype: torch.dtype = torch.float32, name="default", **config):
    """A PeftModel whose adapter says something: peft starts with B = 0."""
    torch.manual_seed(3)
    autocast = config.pop("autocast_adapter_dtype", True)
    options = {"r": 4, "lora_alpha": 11, "target_modules": ["up", "down"], "lora_dropout": 0.3} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = (model or Model()).to(dtype)
        got = get_peft_model(base, LoraConfig(**options), adapter_name=name, autocast_adapter_dtype=autocast)
    return spoken(got)


def spoken(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def merged(model) -> dict[str, torch.Tensor]:
    """What peft makes of a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(copy.deepcopy(model).merge_and_unload().state_dict())


def sent(source) -> dict[str, torch.Tensor]:
    layout = source.layout()
    found = {}
    for i in range(len(layout)):
        shard = layout.shard(i)
        out = torch.full(shard.shape, -7.0, dtype=getattr(torch, shard.dtype))
        source.read_into(i, (0,) * out.dim(), tuple(shard.shape), out)
        found[shard.name] = out
    return found | {other: found[name] for other, name in layout.tensors.aliases}


def assert_sent(model, expected: dict[str, torch.Tensor] | None = None, **options) -> None:
    found = sent(source_of(model, **options))
    expected = merged(model) if expected is None else expected
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def shard_named(source, name: str) -> int:
    layout = source.layout()
    return next(i for i in range(len(layout)) if layout.shard(i).name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("own_dtype", [False, True], ids=["float32-adapter", "adapter-as-base"])
def test_a_peft_model_is_sent_as_peft_merges_it_bit_for_bit(dtype, own_dtype):
    model = adapted(dtype=dtype, autocast_adapter_dtype=not own_dtype)
    if own_dtype:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    assert isinstance(source_of(model), LoraSource)
    assert_sent(model)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"target_modules": ["mixed"], "fan_in_fan_out": True},
        {"target_modules": ["embed", "head"]},
        {"target_modules": "all-linear", "r": 1},
        {"rank_pattern": {"up": 7}, "alpha_pattern": {"down": 2}},
        {"modules_to_save": ["head", "norm"]},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
    ],
    ids=lambda config: "-".join(config),
)
def test_configurations(config):
    model = adapted(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.rand_like(parameter)  # trained, whatever it is
    assert_sent(model)


def test_names_are_those_of_the_base_model():
    names = [name for name, _ in Model().named_parameters()]
    layout = source_of(adapted(modules_to_save=["head"])).layout()
    assert [layout.shard(i).name for i in range(len(layout))] == names


def test_a_layout_is_that_of_the_base_model_and_the_same_object_each_time():
    layout = source_of(adapted()).layout()
    assert layout == ModuleSource(Model()).layout()
    assert source_of(adapted()).layout() is layout


def test_a_box_is_merged_alone_and_differs_at_most_in_the_order_of_sums():
    model = adapted(target_modules=["up", "mixed"], r=16)
    expected = merged(model)
    source = source_of(model)
    for name in ("layers.0.up.weight", "mixed.weight"):
        shard = shard_named(source, name)
        rows, columns = expected[name].shape
        boxes = [((0, 0), (1, columns)), ((3, 5), (7, 11)), ((rows - 1, columns - 1), (1, 1)), ((0, 7), (rows, 2))]
        for offset, shape in boxes:
            slot = torch.zeros(rows + 1, columns + 3)
            out = slot[: shape[0], 1 : shape[1] + 1]  # strided, as a part of a piece is
            source.read_into(shard, offset, shape, out)
            wanted = expected[name][offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]
            torch.testing.assert_close(out, wanted, rtol=0, atol=8 * 2**-24 * float(wanted.abs().max()))
            assert not slot[shape[0] :].any()
            assert not slot[:, 0].any()


def test_a_merged_tensor_is_taken_for_no_memory_and_the_others_for_theirs():
    model = adapted()
    source = source_of(model)
    for i in range(len(source.layout())):
        shard = source.layout().shard(i)
        data = source.box_bytes(i, (0,) * len(shard.shape), tuple(shard.shape))
        if shard.name.endswith(("up.weight", "down.weight")):
            assert source.local(i) is None
            assert data is None
        else:
            assert source.local(i) is not None
            assert data is not None
    head = source.local(shard_named(source, "head.weight"))
    assert head is not None
    assert head.data_ptr() == model.base_model.model.head.weight.data_ptr()
    assert source.nbytes == ModuleSource(Model()).nbytes


def test_the_model_is_left_as_it_is():
    model = adapted(modules_to_save=["head"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counters = {name: parameter._version for name, parameter in model.named_parameters()}
    sent(source_of(model))
    assert counters == {name: parameter._version for name, parameter in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module.merged for module in model.modules() if hasattr(module, "lora_A"))


def test_the_next_read_sees_the_next_step():
    model = adapted()
    source = source_of(model)
    before = sent(source)["layers.0.up.weight"]
    with torch.no_grad():
        spoken(model)
    assert not torch.equal(sent(source)["layers.0.up.weight"], before)
    assert_sent(model)


def test_several_adapters_and_the_active_ones_count():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(dtype=torch.bfloat16, name="first")
        model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["up", "head"], use_rslora=True))
        spoken(model)
        assert_sent(model)
        model.set_adapter("second")
        assert_sent(model)
        assert source_of(model).local(shard_named(source_of(model), "layers.0.down.weight")) is not None
        model.base_model.set_adapter(["first", "second"])
        both = merged(model)
        assert_sent(model, both)
        model.base_model.set_adapter(["second", "first"])
        assert_sent(model)  # each sum is rounded to bfloat16, so that the order counts
    assert any(not torch.equal(both[name], tensor) for name, tensor in merged(model).items())


def test_of_modules_to_save_the_active_copy_is_sent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(name="a", modules_to_save=["head"])
        model.add_adapter("b", LoraConfig(target_modules=["up"], modules_to_save=["head"]))
        heads = model.base_model.model.head.modules_to_save
        with torch.no_grad():
            heads["a"].weight.fill_(1)
            heads["b"].weight.fill_(2)
        for name, value in (("a", 1), ("b", 2)):
            model.set_adapter(name)
            head = sent(source_of(model))["head.weight"]
            assert head.unique().tolist() == [value]


def test_a_rescaled_layer_is_sent_rescaled():
    model = adapted()
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.5)
    assert_sent(model)


def test_adapters_that_peft_has_merged_are_in_the_weights_already():
    model = adapted()
    expected = merged(model)
    model.merge_adapter()
    assert_sent(model, expected)


def test_layers_injected_into_a_plain_module_are_known():
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), model)
    spoken(model)
    source = source_of(model)
    assert isinstance(source, LoraSource)
    layer: Any = model.get_submodule("layers.0.up")
    found = sent(source)["layers.0.up.weight"]
    assert torch.equal(found, layer.base_layer.weight.data + layer.get_delta_weight("default"))


def test_a_module_without_adapters_is_described_as_ever():
    assert isinstance(source_of(Model()), ModuleSource)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_merged_and_then_converted(dtype):
    model = adapted(Model(width=1100))  # more than is converted at once
    expected = {name: tensor.to(dtype).float() for name, tensor in merged(model).items()}
    found = sent(source_of(model, dtype=dtype))
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        # a tensor in several parts is summed in another order, and may then round the other way
        torch.testing.assert_close(found[name].float(), tensor, rtol=torch.finfo(dtype).eps, atol=0)


def test_autocast_around_a_push_changes_nothing():
    model = adapted()
    expected = merged(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_sent(model, expected)


def test_a_layer_that_occurs_twice_is_sent_once():
    model = Model()
    model.layers[1] = model.layers[0]
    source = source_of(adapted(model))
    assert ("layers.1.up.weight", "layers.0.up.weight") in source.layout().tensors.aliases


def test_tied_tensors_that_adapters_leave_alone_stay_tied():
    assert_sent(adapted(Model(tied=True)))


def refused(model) -> str:
    with pytest.raises(SourceError) as caught:
        source_of(model)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("target", ["head", "embed"])
def test_an_adapter_on_one_of_two_tied_tensors_is_refused(target):
    assert "'embed.weight' and 'head.weight' are tied" in refused(adapted(Model(tied=True), target_modules=[target]))


def test_a_trained_copy_of_one_of_two_tied_tensors_is_refused():
    message = refused(adapted(Model(tied=True), modules_to_save=["head"]))
    assert "'head.weight' is trained as a copy" in message
    assert "'embed.weight'" in message


def test_what_lora_does_not_describe_is_refused_with_the_layers_name():
    assert refused(adapted(use_dora=True)) == (
        "adapter 'default' of layer 'layers.0.up' is of the variant DoraLinearVariant"
    )
    assert "'layers.0.up' has a bias" in refused(adapted(target_modules=["up"], lora_bias=True))
    experts = adapted(Experts(), target_modules=[], target_parameters=["experts.gate"], lora_dropout=0.0)
    assert "ParamWrapper" in refused(experts)


def test_other_methods_of_peft_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ia3 = get_peft_model(Model(), peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
        conv = nn.Sequential(nn.Conv1d(3, 4, 2))
        lora_conv = get_peft_model(conv, LoraConfig(target_modules=["0"]))
        tokens = adapted(trainable_token_indices={"embed": [1, 2]})
    assert "'layers.0.up' is peft's peft.tuners.ia3" in refused(ia3)
    assert "'0' is peft's peft.tuners.lora.layer.Conv1d" in refused(lora_conv)
    assert "'embed' is in peft's TrainableTokensWrapper" in refused(tokens)


def test_disabled_adapters_are_refused_rather_than_merged():
    model = adapted(modules_to_save=["head"])
    with model.disable_adapter():
        assert "'layers.0.up' are disabled" in refused(model)
    assert_sent(model)


def test_disabled_adapters_are_refused_where_they_were_merged_before():
    """The next forward takes them out of the weights, which have them until then."""
    model = adapted()
    expected = merged(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert "'layers.0.up' are disabled" in refused(model)
    assert_sent(model, expected)


def test_a_mixture_of_loras_is_refused(tmp_path):
    """X-LoRA's layers are LoRA's own, and weigh the adapters anew for each token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, use_cache=False, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in "ab":
            get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"])).save_pretrained(
                tmp_path / name
            )
        mixture = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=8, xlora_depth=1, adapters={n: str(tmp_path / n) for n in "ab"}
        )
        model = get_peft_model(LlamaForCausalLM(config), mixture)
    assert "XLORA" in refused(model)


def test_a_mixed_model_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["up"]), mixed=True)
    assert "PeftMixedModel" in refused(model)


def test_a_wrapped_peft_model_is_refused_with_the_way_to_it():
    wrapper = nn.Module()
    wrapper.policy = adapted()
    assert refused(wrapper) == "module 'policy' is a PeftModel inside the one that was given"


def test_a_quantised_weight_is_refused_by_name():
    model = adapted()
    layer = model.base_model.model.layers[0].up.base_layer
    layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert "'layers.0.up.weight' is torch.uint8 (864, 1), to which adapter 'default' adds (72, 4)" in refused(model)


def test_a_pattern_that_no_tensor_of_the_base_model_matches_is_refused():
    with pytest.raises(SourceError, match=r"only = 'haed\.weight' chooses none of"):
        source_of(adapted(), only=["layers.*", "haed.weight"])
