"""Adapters as files: peft itself reads back what is sent."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load
from torch import nn

from weightsync.errors import SourceError
from weightsync.sources.lora_files import adapter_files

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lowered: torch.Tensor = self.down(self.up(x).relu())
        return lowered


def adapted(**config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(), peft.LoraConfig(**({"r": 4, "target_modules": ["up", "down"]} | config)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_alpha": 3, "lora_dropout": 0.5}], ids=str)
def test_peft_reads_what_is_sent(config, tmp_path):
    model = adapted(**config)
    said, weights = adapter_files(model)
    (tmp_path / "adapter_config.json").write_bytes(said)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    base = Model()
    base.load_state_dict(
        {n.replace(".base_layer", ""): t for n, t in model.get_base_model().state_dict().items() if "lora_" not in n}
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.rand(3, 6)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_tensors_and_their_config_are_sent_as_they_are():
    tensors = {
        "base_model.model.up.lora_A.weight": torch.rand(4, 6, dtype=torch.float64).bfloat16().t().contiguous().t()
    }
    said, weights = adapter_files(tensors, {"peft_type": "LORA", "r": 4, "target_modules": {"up"}})
    assert json.loads(said) == {"peft_type": "LORA", "r": 4, "target_modules": ["up"], "inference_mode": True}
    sent = load(weights)
    assert sent.keys() == tensors.keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in tensors.items())
    assert adapter_files(tensors, peft.LoraConfig(r=4))[1] == weights


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["down"], "target_modules": ["up"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"alpha_pattern": {"up": 3}}, "engines scale all layers alike"),
        ({"rank_pattern": {"up": 2}}, "engines scale all layers alike"),
    ],
    ids=str,
)
def test_what_engines_would_compute_otherwise_is_refused(config, words):
    with pytest.raises(SourceError) as caught:
        adapter_files(adapted(lora_alpha=8, **config))
    assert words in caught.value.message
    assert "push_weights" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_bdlora": {}}, None),
        ({"init_lora_weights": "gaussian"}, None),
    ],
    ids=str,
)
def test_what_peft_has_done_to_the_base_or_does_to_some_tokens_alone_is_refused(said, words):
    tensors = {"base_model.model.up.lora_A.weight": torch.zeros(4, 8)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **said}
    if words is None:
        assert adapter_files(tensors, config)
        return
    with pytest.raises(SourceError) as caught:
        adapter_files(tensors, config)
    assert words in caught.value.message


def test_an_adapter_scaled_by_the_root_of_its_rank_is_scaled_so_by_who_divides_by_the_rank():
    model = adapted(lora_alpha=8, use_rslora=True)
    said = json.loads(adapter_files(model)[0])
    assert not said["use_rslora"]
    assert said["lora_alpha"] / said["r"] == pytest.approx(model.base_model.model.up.scaling["default"])


def test_a_rescaled_layer_is_refused():
    model = adapted()
    model.base_model.model.up.scale_layer(0.5)
    with pytest.raises(SourceError, match=r"'base_model\.model\.up' scales by 1, and its config says 2"):
        adapter_files(model)


def test_several_active_adapters_are_refused():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up"]))
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SourceError, match=r"2 adapters are active \(default, second\)"):
        adapter_files(model)


def test_what_is_no_adapter_is_refused():
    with pytest.raises(SourceError, match="Model is no PeftModel"):
        adapter_files(Model())
