"""A LoRA fine-tune on a GPU: merged there, into slots there, after what the trainer has queued."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import httpx
import pytest
import torch

from tests.gpu.test_push import DENSE
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.fleet import Fleet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.timeout(240), pytest.mark.e2e]
VERSIONS = itertools.count(1)


@pytest.fixture(scope="module")
def fleet():
    with Fleet() as fleet:
        random_checkpoint(DENSE, fleet.root / "A", 0)
        fleet.start_engine("e0", fleet.root / "A", device="cuda")
        yield fleet


def held(fleet) -> Any:
    engine = fleet.children[0]
    return httpx.get(f"{engine.url}/checksums", trust_env=False, timeout=30).raise_for_status().json()


@pytest.fixture(scope="module")
def daemon(fleet):
    return fleet.start_daemon("lora-gpu", [fleet.children[0]], arena={"slot_bytes": "1MiB", "slots": 2})


def adapted(fleet, device: str, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(fleet.root / "A", dtype=torch.bfloat16).to(device)
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).mul_(0.1).to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_engines_hold_what_peft_merges(fleet, daemon, device, dtype):
    model = adapted(fleet, device, dtype)
    for _ in range(2):
        with torch.no_grad():
            if device == "cuda":
                torch.cuda._sleep(200_000_000)  # a step that is not over at the push
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += 0.1
        version = next(VERSIONS)
        report = push_weights(model, version=version, daemon=daemon.endpoint, timeout=60)
        assert report.complete, str(report)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = copy.deepcopy(model).merge_and_unload()
        whole = {name: parameter.detach().cpu() for name, parameter in merged.named_parameters()}
        assert held(fleet) == expected_checksums(DENSE, whole, 1)
