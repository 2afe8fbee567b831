"""LoRA adapters alone, into real servers that serve them beside the base model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.kit import RealEngine, Running, Said, installed, model, oracle
from weightsync import push_lora
from weightsync.errors import PushAborted, PushRefused
from weightsync.fleet import Daemon, Fleet
from weightsync.testing import eventually

pytestmark = [pytest.mark.engines, pytest.mark.engines_slow, pytest.mark.timeout(400)]

FLAGS = {
    "vllm": ("--enable-lora", "--max-lora-rank", "8"),
    "sglang": (
        *("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all", "--lora-backend", "torch_native"),
        *("--max-loras-per-batch", "2"),
    ),
}
PROMPT = (5, 6, 7)
PREFIX = {"vllm": "/v1", "sglang": ""}
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "base_model_name_or_path": "tiny",
}


def adapter(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Matrices for the tiny checkpoint, named as peft saves them."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model("dense_base") / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in CONFIG["target_modules"]:
            rows, columns = weight.shape
            for matrix, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                full = f"base_model.model.{path}.lora_{matrix}.weight"
                tensors[full] = 0.2 * torch.randn(shape, generator=random)
    return tensors


@dataclass
class Served:
    engine: RealEngine
    daemon: Daemon

    def push(self, tensors: dict[str, torch.Tensor], version: int, **options: Any):
        config = CONFIG | {"r": tensors[next(iter(tensors))].shape[0]}
        return push_lora(tensors, config=config, version=version, daemon=self.daemon.endpoint, timeout=60, **options)

    def generate(self, name: str, count: int = 16) -> Said:
        if self.engine.kind == "vllm":
            choice = self.engine.post("/v1/completions", self.body(name, count) | {"logprobs": 0})["choices"][0]
            return Said(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
        answer = self.engine.post("/generate", self.body(name, count) | {"return_logprob": True})
        pairs = answer["meta_info"]["output_token_logprobs"]
        return Said(tuple(int(token) for _, token, *_ in pairs), tuple(logprob for logprob, *_ in pairs))

    def body(self, name: str, count: int) -> dict[str, Any]:
        if self.engine.kind == "vllm":
            terms = {"max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            return {"model": name, "prompt": list(PROMPT), **terms}
        sampling = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        named = {} if name == "tiny" else {"lora_path": name}
        return {"input_ids": list(PROMPT), "sampling_params": sampling, **named}

    def names(self) -> set[str]:
        return {card["id"] for card in self.engine.get("/v1/models")["data"] if card["parent"]}


class OnAdapter:
    """What `Running` asks of an engine, for one adapter."""

    def __init__(self, served: Served, name: str) -> None:
        self.name = name
        self._engine = served.engine
        self._served = served

    def stream(self, _prompt, count):
        plain = self._engine
        body = self._served.body(self.name, count)
        bound = RealEngine(plain.kind, plain.checkpoint, plain.root, port=plain.port)
        bound._completion = bound._generation = lambda *_: body
        return bound.stream(PROMPT, count)


@pytest.fixture(params=["vllm", "sglang"])
def served(request, _yard, tmp_path):
    if not installed(request.param):
        pytest.fail(f"{request.param} is not installed: run `make engines`")
    _yard.close()  # one server at a time
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    flags = FLAGS[request.param]
    engine = RealEngine(
        request.param, model("dense_base"), tmp_path, name=f"lora-{request.param}", flags=flags, env=env
    )
    with engine, Fleet() as fleet:
        name = f"lora{os.getpid()}-{request.param}"
        endpoint = f"ipc://{fleet.root / name}.sock"
        config = fleet.root / "node.toml"
        config.write_text(
            f'[node]\nname = "{name}"\nlisten = "{endpoint}"\n[arena]\ndevice = "cpu"\nslots = 2\nslot_bytes = "1MiB"\n'
            f'[[engines]]\nname = "engine"\nkind = "{request.param}"\nurl = "{engine.url}"\n'
        )
        child = fleet.spawn(name, ("-m", "weightsyncd", "--node-config", str(config)))
        daemon = Daemon(name, child.process, child.log, endpoint=endpoint, config=config)
        fleet.wait_daemon(daemon)
        yield Served(engine, daemon)


def test_an_adapter_alone(served, tmp_path):
    first, second = adapter(1), adapter(2)
    oracle("dense_base").check(served.engine)
    plain = served.generate("tiny")

    # what the server makes of the same adapter on disk, by its own route and without us
    disk = tmp_path / "disk"
    disk.mkdir()
    save_file(first, disk / "adapter_model.safetensors")
    (disk / "adapter_config.json").write_text(json.dumps(CONFIG))
    served.engine.post(f"{PREFIX[served.engine.kind]}/load_lora_adapter", {"lora_name": "disk", "lora_path": str(disk)})
    wanted = served.generate("disk")
    assert wanted.differs(plain)

    report = served.push(first, 1)
    assert report.complete
    assert report.served == "policy@1"
    assert not served.generate("policy@1").differs(wanted)
    assert not served.generate("tiny").differs(plain)

    # the next version, while a request is under way on this one
    alone = served.generate("policy@1", 300).tokens
    request = Running(OnAdapter(served, "policy@1"), PROMPT, 300)
    request.wait_first()
    assert served.push(second, 2).complete
    other = served.generate("policy@2")
    assert other.differs(wanted)
    assert other.differs(plain)
    request.wait_end()
    assert not request.error
    assert tuple(request.tokens) == alone, "it went on with what it began with"
    assert eventually(lambda: served.names() == {"disk", "policy@2"}, seconds=30), served.names()

    with pytest.raises(PushRefused, match="policy@2 loaded already"):
        served.push(first, 2)
    with pytest.raises(PushAborted, match="no engine has loaded policy@3") as caught:
        served.push(adapter(3, rank=16), 3)
    assert "rank" in caught.value.message
    assert not served.generate("policy@2").differs(other)
    assert served.names() == {"disk", "policy@2"}
