"""LoRA adapters alone, into real servers that serve them beside the base model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.kit import RealEngine, Running, Said, installed, model, oracle
from weightsync import push_lora
from weightsync.errors import PushAborted, PushRefused
from weightsync.fleet import Daemon, Fleet
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync import LoraReport

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
CONFIG: dict[str, Any] = {
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


class OnAdapter(RealEngine):
    """The same server, asked for an adapter."""

    lora = ""

    def _completion(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        return super()._completion(prompt, count) | {"model": self.lora}

    def _generation(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        return super()._generation(prompt, count) | {"lora_path": self.lora}


@dataclass
class Served:
    engine: RealEngine
    daemon: Daemon

    def push(self, tensors: dict[str, torch.Tensor], version: int) -> LoraReport | None:
        config = CONFIG | {"r": min(tensors[next(iter(tensors))].shape)}
        return push_lora(tensors, config=config, version=version, daemon=self.daemon.endpoint, timeout=60)

    def on(self, name: str) -> OnAdapter:
        engine = OnAdapter(self.engine.kind, self.engine.checkpoint, self.engine.root, port=self.engine.port)
        engine.lora = name
        return engine

    def said(self, name: str, count: int = 16) -> Said:
        return self.on(name).generate(PROMPT, count)

    def names(self) -> set[str]:
        return {card["id"] for card in self.engine.get("/v1/models")["data"] if card["parent"]}


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
    plain = served.engine.generate(PROMPT, 16)

    # what the server makes of the same adapter on disk, by its own route and without us
    disk = tmp_path / "disk"
    disk.mkdir()
    save_file(first, disk / "adapter_model.safetensors")
    (disk / "adapter_config.json").write_text(json.dumps(CONFIG))
    url = f"{served.engine.url}{PREFIX[served.engine.kind]}/load_lora_adapter"
    body = {"lora_name": "disk", "lora_path": str(disk)}
    httpx.post(url, json=body, timeout=60, trust_env=False).raise_for_status()
    wanted = served.said("disk")
    assert wanted.differs(plain)

    report = served.push(first, 1)
    assert report is not None
    assert report.complete
    assert report.served == "policy@1"
    assert not served.said("policy@1").differs(wanted)
    assert not served.engine.generate(PROMPT, 16).differs(plain)

    # the next version, while a request is under way on this one
    alone = served.said("policy@1", 300).tokens
    request = Running(served.on("policy@1"), PROMPT, 300)
    request.wait_first()
    assert served.push(second, 2) is not None
    other = served.said("policy@2")
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
    assert not served.said("policy@2").differs(other)
    assert served.names() == {"disk", "policy@2"}
