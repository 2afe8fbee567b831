"""LoRA fine-tunes pushed through a real daemon into real engines: they hold what peft would merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.marks import slow
from weightsync import push_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.e2e


def adapted(node, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]} | config
        model = AutoModelForCausalLM.from_pretrained(node.checkpoint("B"))
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def merged(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"], "use_rslora": True}], ids=["plain", "more"])
def test_a_fine_tune_pushes_in_one_call_and_again_after_a_step(node, config):
    model = adapted(node, **config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        with torch.no_grad():
            for parameter in trained:
                parameter += 0.1 * torch.randn_like(parameter)
        version = next(node.versions)
        report = push_weights(model, version=version, daemon=node.daemon.endpoint, timeout=30)
        assert report.complete, str(report)
        node.assert_holds(merged(model), version)


def test_a_fine_tune_is_merged_in_its_own_type_and_sent_in_another(node):
    model = adapted(node).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    version = next(node.versions)
    report = push_weights(model, version=version, daemon=node.daemon.endpoint, timeout=30, dtype="float32")
    assert report.complete, str(report)
    node.assert_holds({name: tensor.float() for name, tensor in merged(model).items()}, version)


@pytest.mark.parametrize("ranks", [slow(2), 3])
def test_fsdp2_ranks_push_a_fine_tune(node, ranks, tmp_path):
    script = Path(__file__).with_name("lora_push.py")
    first, _, last = (next(node.versions) for _ in range(3))
    arguments = [node.checkpoint("B"), node.daemon.endpoint, str(first), str(tmp_path)]
    trainer = node.fleet.torchrun(f"lora-{ranks}", script, ranks, arguments)
    assert trainer.wait(150) == 0, trainer.tail(60)
    told = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(ranks)]
    alone = [one.pop("alone") for one in told]
    assert told.count(told[0]) == ranks
    # the first rank alone speaks; reference engines serve no adapters
    assert alone[1:] == [["None", "None"]] * (ranks - 1)
    sharded, refused = alone[0]
    assert sharded.endswith("lora_A.weight' of the adapter is sharded")
    assert refused == "engine e1 is of kind reference, which takes no LoRA adapters"
    message, hint = told[0]["refused"]
    assert message.startswith("trainer rank ")
    assert message.endswith(
        " failed: this rank holds a part of tensor 'model.layers.0.self_attn.q_proj.weight', but not what adapter "
        "'default' adds to it: its lora_A is sharded too"
    )
    assert "gather=True" in hint
    assert told[0]["complete"] == [True] * 3
    node.assert_holds(load_file(tmp_path / "merged.safetensors"), last)
