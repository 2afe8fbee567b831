"""The decoder against answers recorded from transformers, its slices against the whole, and under FSDP2."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weightsync.adapters.reference.checkpoint import open_checkpoint, save_tensors
from weightsync.adapters.reference.config import ModelConfig, read_config
from weightsync.adapters.reference.model import (
    CausalLM,
    greedy,
    load_checkpoint,
    random_checkpoint,
    save_checkpoint,
)
from weightsync.adapters.reference.parallel import Ranks
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.adapters.reference.worker import Worker
from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

ORACLE = json.loads((Path(__file__).parent.parent / "data" / "reference_oracle.json").read_text())
CASES = {case["name"]: case for case in ORACLE["cases"]}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    found = CASES[request.param]
    random_checkpoint(msgspec.convert(found["config"], ModelConfig), tmp_path, found["seed"])
    return found, tmp_path


def test_it_computes_what_transformers_computes(case: tuple[dict[str, Any], Path]) -> None:
    answers, directory = case
    model = load_checkpoint(directory)
    with torch.no_grad():
        logits = model(torch.tensor([answers["prompt"]]))[0]
    torch.testing.assert_close(logits[0, :12], torch.tensor(answers["first_logits"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[-1, :12], torch.tensor(answers["last_logits"]), atol=1e-4, rtol=0)
    assert greedy(model, answers["prompt"], len(answers["greedy"])) == answers["greedy"]


def test_parameters_are_called_as_in_the_checkpoint(case: tuple[dict[str, Any], Path]) -> None:
    model = load_checkpoint(case[1])
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == checkpoint_tensors(model.config)


def test_the_engine_decoder_with_its_cache_agrees_with_the_whole_model(case: tuple[dict[str, Any], Path]) -> None:
    """On one rank, so in one process; with two see the end-to-end tests."""
    answers, directory = case
    worker = Worker(read_config(directory), Ranks("unused", 1, 0, timeout=1))
    worker.load_checkpoint(str(directory))
    tokens, cached, logprobs = list(answers["prompt"]), 0, []
    for _ in answers["greedy"]:
        choice = worker.decoder.step(1, cached, tokens[cached:])
        cached = len(tokens)
        tokens.append(choice.token)
        logprobs.append(choice.logprob)
    start = len(answers["prompt"])
    assert tokens[start:] == answers["greedy"]
    with torch.no_grad():
        expected = load_checkpoint(directory)(torch.tensor([tokens]))[0].log_softmax(-1)
    for at, (token, logprob) in enumerate(zip(tokens[start:], logprobs, strict=True), start - 1):
        assert logprob == pytest.approx(float(expected[at, token]), abs=1e-4)
    worker.loader.close()


def test_checkpoints_survive_a_round_trip(case: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    model = load_checkpoint(case[1])
    save_checkpoint(model, tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    assert again.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def test_draws_spread_over_the_vocabulary_yield_the_distribution(tmp_path: Path) -> None:
    random_checkpoint(SMALL, tmp_path, 0)
    worker = Worker(SMALL, Ranks("unused", 1, 0, timeout=1))
    worker.load_checkpoint(str(tmp_path))
    count, prompt = 200, [3, 1, 4]
    choices = [worker.decoder.step(1, 0, prompt, (i + 0.5) / count) for i in range(count)]
    shares = torch.bincount(torch.tensor([c.token for c in choices]), minlength=SMALL.vocab_size) / count
    with torch.no_grad():
        expected = load_checkpoint(tmp_path)(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    torch.testing.assert_close(shares, expected.exp(), atol=1 / count + 1e-4, rtol=0)
    for choice in choices:
        assert choice.logprob == pytest.approx(float(expected[choice.token]), abs=1e-4)
    worker.loader.close()


def test_a_seed_names_a_checkpoint(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        random_checkpoint(SMALL, tmp_path / name, seed, "bfloat16")
    a, b, c = (dict(load_checkpoint(tmp_path / name).named_parameters()) for name in "abc")
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in a)
    assert {p.dtype for p in a.values()} == {torch.bfloat16}


def test_large_checkpoints_are_written_in_several_files(tmp_path: Path) -> None:
    random_checkpoint(SMALL, tmp_path, 1)
    model = load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_tensors(((name, p.detach()) for name, p in model.named_parameters()), tmp_path, file_bytes=4096)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    for (name, a), (_, b) in zip(model.named_parameters(), load_checkpoint(tmp_path).named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    random_checkpoint(SMALL, tmp_path, 1)
    with pytest.raises(ConfigError, match=r"has no tensor 'model\.layers\.2"):
        open_checkpoint(tmp_path, msgspec.structs.replace(SMALL, num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"embed_tokens.*has shape \[50, 16\]"):
        open_checkpoint(tmp_path, msgspec.structs.replace(SMALL, vocab_size=51))
    with pytest.raises(ConfigError, match="no \\*\\.safetensors"):
        open_checkpoint(tmp_path / "nowhere", SMALL)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ConfigError, match="outside its directory"):
        open_checkpoint(tmp_path, SMALL)


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()  # a group that outlives `destroy` through some cycle aborts the process at its end, now and then
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_it_trains_under_fsdp2_with_a_gradient_for_every_expert(tmp_path: Path) -> None:
    config = msgspec.structs.replace(
        SMALL,
        architecture="Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        tie_word_embeddings=True,
    )
    random_checkpoint(config, tmp_path, 1)
    plain, model = load_checkpoint(tmp_path), load_checkpoint(tmp_path)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.tensor([[3, 1, 4]])
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0])
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(torch.nn.functional.cross_entropy(plain(ids)[0], ids[0]).item(), abs=1e-5)
    assert losses[1] < losses[0]
    assert len(greedy(model, [1, 2], 3)) == 3


def test_generation_ends_at_an_end_token(tmp_path: Path) -> None:
    random_checkpoint(SMALL, tmp_path, 1)
    model = load_checkpoint(tmp_path)
    tokens = greedy(model, [1, 2], 8)
    ending = CausalLM(msgspec.structs.replace(SMALL, eos_token_id=(tokens[2],)))
    ending.load_state_dict(model.state_dict())
    assert greedy(ending, [1, 2], 8) == tokens[: tokens.index(tokens[2]) + 1]
