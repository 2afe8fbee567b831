"""TRL's real trainers on a CPU, with reference engines as what generates."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.conftest import TINY

pytest.importorskip("trl", reason="trl is not installed (with transformers, accelerate and datasets over 400 MB)")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # TRL's own and those of what it stands on
]


def tokenizer():
    """A token for each byte, and three more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def transformers_model(checkpoint: str):
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


class Rollouts:
    """A `rollout_func` that has an engine generate, and notes which version did."""

    def __init__(self, node, engine) -> None:
        self.node, self.engine = node, engine
        self.versions: list[int] = []

    def __call__(self, prompts, trainer):
        found: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        self.versions.append(self.node.info(self.engine)["weight_version"])
        for prompt in prompts:
            ids = trainer.processing_class(prompt)["input_ids"]
            body = {"prompt_ids": ids, "max_tokens": 6, "logprobs": True}
            got = httpx.post(f"{self.engine.url}/generate", json=body, timeout=60, trust_env=False).raise_for_status()
            found["prompt_ids"].append(ids)
            found["completion_ids"].append(got.json()["token_ids"])
            found["logprobs"].append(got.json()["logprobs"])
        return found


def test_grpo_generates_with_what_it_has_just_learnt(node, tmp_path, monkeypatch):
    """GRPOTrainer itself: rollouts from an engine, the callback's pushes, versions that follow the steps."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from weightsync.integrations.trl import PushCallback

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    model = transformers_model(node.checkpoint("A"))
    rollouts = Rollouts(node, node.engines[0])
    pushed: Any = PushCallback(daemon=node.daemon.endpoint, timeout=60)

    class Compare(TrainerCallback):  # type: ignore[misc]
        steps = 0

        def on_step_end(self, args, state, control, model, **_):
            node.assert_holds(weights_of(model), pushed.report.version)
            self.steps += 1

    compare = Compare()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) + i for i, text in enumerate(completions)],
        args=GRPOConfig(
            str(tmp_path), use_cpu=True, max_steps=3, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=6, learning_rate=0.1, report_to=[], save_strategy="no", bf16=False,
            logging_strategy="no", gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["abc", "hello", "xyz", "what"]}),
        processing_class=tokenizer(),
        rollout_func=rollouts,
        callbacks=[pushed, compare],
    )  # fmt: skip
    start = weights_of(model)
    trainer.train()
    assert compare.steps == 3
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights_of(model).items()), "nothing learnt"
    assert len(set(rollouts.versions)) == 3, "each step's rollouts come from that step's weights"
    assert rollouts.versions == sorted(rollouts.versions)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_of_accelerate_push_what_they_hold(node, kind, tmp_path):
    """transformers' Trainer on two ranks, as accelerate wraps its model."""
    script = Path(__file__).with_name("integrations_trainer.py")
    trainer = node.fleet.torchrun(
        f"accelerate-{kind}", script, 2, [node.checkpoint("B"), node.daemon.endpoint, kind, str(tmp_path)]
    )
    assert trainer.wait(200) == 0, trainer.tail(60)
    from safetensors.torch import load_file

    told = json.loads((tmp_path / "told.json").read_text())
    assert told["steps"] == [0, 1, 2]
    assert told["versions"] == sorted(set(told["versions"]))
    node.assert_holds(load_file(tmp_path / "after.safetensors"), told["versions"][-1])


def test_what_async_grpo_gathers_is_pushed(node):
    from trl.experimental.async_grpo import async_grpo_trainer

    from weightsync.integrations.trl import WeightTransfer

    wanted = {name for name in vars(async_grpo_trainer.WeightTransferProtocol) if not name.startswith("_")}
    assert wanted <= set(dir(WeightTransfer))
    transfer: Any = WeightTransfer(daemon=node.daemon.endpoint, timeout=60)
    model = transformers_model(node.checkpoint("B"))
    transfer.init_weight_transfer()
    for _ in range(2):
        transfer.pause()
        transfer.send_weights(async_grpo_trainer._iter_vllm_named_params(model))
        transfer.resume()
    transfer.destroy()
    node.assert_holds(node.weights("B"), transfer.report.version)


class _Front(BaseHTTPRequestHandler):
    """Of a vLLM server, what TRL asks before it generates."""

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "tiny"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def front():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Front) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_where_trl_would_sync_with_its_vllm_server_it_pushes(node, monkeypatch):
    """TRL's own VLLMGeneration and VLLMClient, of a server of which only what it asks first is there."""
    from accelerate import Accelerator
    from trl.generation import vllm_client, vllm_generation

    from weightsync.integrations.trl import push_to_vllm_server

    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", vllm_client.VLLMClient.init_communicator)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", vllm_generation.VLLMGeneration.sync_weights)
    push_to_vllm_server(daemon=node.daemon.endpoint, timeout=60)
    model = transformers_model(node.checkpoint("A"))
    with front() as url:
        generation = vllm_generation.VLLMGeneration(
            model, Accelerator(cpu=True), tokenizer(), mode="server", server_base_url=url
        )
        for _ in range(2):
            generation.sync_weights()
            node.assert_holds(node.weights("A"), generation.weightsync_report.version)


assert TINY.vocab_size == 259, "the tokenizer has as many"
