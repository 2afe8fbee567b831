"""Whole pushes on GPUs: FSDP2 ranks, a daemon, and reference engines, all with their weights on the same GPUs."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
import torch
from safetensors.torch import load_file

from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.errors import WeightSyncError
from weightsync.fleet import Daemon, Engine, Fleet
from weightsync.operator import fetch_status
from weightsync.sources.checkpoint import CheckpointSource
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.timeout(240), pytest.mark.e2e]

DENSE = ModelConfig(
    vocab_size=1003,  # odd, so that every tp pads and FSDP shards are uneven
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    dtype="bfloat16",
)
MODELS = {
    "dense": DENSE,
    "tied": msgspec.structs.replace(DENSE, tie_word_embeddings=True),
    "moe": msgspec.structs.replace(
        DENSE,
        architecture="Qwen3MoeForCausalLM",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
}


TPS = {"dense": (1, 2, 8), "tied": (1, 4), "moe": (2, 4)}


@dataclass
class Node:
    """A daemon with engines for each model, on checkpoint A; ranks beyond the number of GPUs share them."""

    fleet: Fleet
    daemon: Daemon
    engines: dict[str, list[Engine]]
    versions: Iterator[int]

    def weights(self, model: str, name: str) -> dict[str, torch.Tensor]:
        return load_file(f"{self.fleet.root}/{model}-{name}/model.safetensors")

    def assert_holds(self, model: str, weights: dict[str, torch.Tensor], version: int) -> None:
        for engine in self.engines[model]:
            found = httpx.get(f"{engine.url}/checksums", trust_env=False, timeout=30).raise_for_status().json()
            assert found == expected_checksums(MODELS[model], weights, engine.tp), engine.name
            info = httpx.get(f"{engine.url}/info", trust_env=False, timeout=30).raise_for_status().json()
            assert (info["weight_version"], info["paused"], info["torn"]) == (version, False, False)

    def push(self, model: str, weights: Any, *, drawn: bool = False, **options: Any) -> int:
        version = next(self.versions)
        report = push_weights(weights, version=version, model=model, daemon=self.daemon.endpoint, timeout=60, **options)
        assert report.complete, str(report)
        assert {e.checked for e in report.engines} == {len(self.weights(model, "A"))}
        assert {e.drawn for e in report.engines} == {drawn}
        return version


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Fleet() as fleet:
        engines: dict[str, list[Engine]] = {}
        for model, config in MODELS.items():
            for seed, name in enumerate("AB"):
                random_checkpoint(config, fleet.root / f"{model}-{name}", seed)
            engines[model] = [
                fleet.start_engine(
                    f"{model}{tp}", fleet.root / f"{model}-A", tp=tp, model=model, device="cuda", wait=False
                )
                for tp in TPS[model]
            ]
        every = [engine for several in engines.values() for engine in several]
        for engine in every:
            fleet.wait_engine(engine)
        daemon = fleet.start_daemon("node0", every, arena={"slot_bytes": "256KiB", "slots": 2})
        yield Node(fleet, daemon, engines, itertools.count(1))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_weights_on_a_gpu_reach_every_rank_of_every_engine(node, model, in_place):
    weights = {name: tensor.cuda() for name, tensor in node.weights(model, "B").items()}
    version = node.push(model, weights, in_place=in_place, drawn=in_place)
    node.assert_holds(model, node.weights(model, "B"), version)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["host", "checkpoint", "strided", "masters", "half", "last-gpu"])
def test_weights_that_lie_otherwise(node, kind, in_place, gpus):
    """In host memory, on disk, transposed, of another type, on another GPU: what the kernel cannot take. An engine on a
    GPU does not read host memory in place.
    """
    sent = node.weights("dense", "A")
    wanted = sent
    options: dict[str, Any] = {}
    weights: Any = sent
    if kind == "checkpoint":
        weights = CheckpointSource(f"{node.fleet.root}/dense-A")
    elif kind == "strided":
        weights = {n: w.cuda().t().contiguous().t() if w.ndim == 2 else w.cuda() for n, w in sent.items()}
    elif kind in ("masters", "half"):
        wide = torch.float32 if kind == "masters" else torch.float16
        weights = {n: (w.to(wide) * 1.01).cuda() for n, w in sent.items()}
        wanted = {n: w.to(torch.bfloat16).cpu() for n, w in weights.items()}
        options = {"dtype": "bfloat16"}
    elif kind == "last-gpu":
        weights = {n: w.to(f"cuda:{i % gpus}") for i, (n, w) in enumerate(sent.items())}
    on_gpus = kind not in ("host", "checkpoint")
    version = node.push("dense", weights, in_place=in_place, drawn=in_place and on_gpus, **options)
    node.assert_holds("dense", wanted, version)


@pytest.mark.parametrize(
    ("model", "master", "share"),
    [
        ("dense", "", 1),
        ("moe", "", 1),
        ("tied", "float32", 1),
        ("dense", "", 2),
        ("dense", "in-place", 1),
        ("moe", "in-place", 1),
        ("tied", "in-place", 2),
    ],
)
def test_fsdp2_ranks_push_their_shards(node, model, master, share, gpus, tmp_path):
    ranks = max(1, gpus // share)
    first, second = next(node.versions), next(node.versions)
    checkpoint = f"{node.fleet.root}/{model}-B"
    arguments = [checkpoint, node.daemon.endpoint, str(first), str(tmp_path), "2", master, model]
    trainer = node.fleet.torchrun(f"fsdp2-{model}{ranks}", Path(__file__).with_name("fsdp2_push.py"), ranks, arguments)
    assert trainer.wait(120) == 0, trainer.tail(60)
    node.assert_holds(model, node.weights(model, "B"), second)
    told = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(ranks)]
    assert all(t == told[0] for t in told), "every rank gets the same report"
    assert [r["complete"] for r in told[0]] == [True, True]
    assert {e["drawn"] for r in told[0] for e in r["engines"]} == {master == "in-place"}


def test_memory_of_expandable_segments_goes_through_slots(node, tmp_path):
    """No other process can map it."""
    first, second = next(node.versions), next(node.versions)
    checkpoint = f"{node.fleet.root}/dense-B"
    arguments = [checkpoint, node.daemon.endpoint, str(first), str(tmp_path), "2", "in-place", "dense"]
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    trainer = node.fleet.torchrun("expandable", Path(__file__).with_name("fsdp2_push.py"), 1, arguments, env=env)
    assert trainer.wait(120) == 0, trainer.tail(60)
    node.assert_holds("dense", node.weights("dense", "B"), second)
    told = json.loads((tmp_path / "rank0.json").read_text())
    assert {e["drawn"] for r in told for e in r["engines"]} == {False}
    assert "expandable_segments" in node.daemon.tail(200)


def test_memory_in_place_that_is_replaced_is_let_go(node):
    """Of engines that have it mapped, and of the GPU: a trainer that makes its weights anew does not run out of it."""
    node.push("dense", node.weights("dense", "A"))  # what slots take the first time is taken now
    free = []
    for round_ in range(4):
        sent = node.weights("dense", "AB"[round_ % 2])
        ballast = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")  # of an allocation of its own …
        weights, at = {}, 0
        for name, tensor in sent.items():  # … in which the weights lie
            place = ballast[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            weights[name] = place.copy_(tensor)
            at += -(-tensor.nbytes // 256) * 256
        for _ in range(3):  # by the third torch's word is taken that they are where they were
            version = node.push("dense", weights, in_place=True, drawn=True)
        node.assert_holds("dense", sent, version)
        del ballast, weights, place
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    node.push("dense", {name: tensor.cuda() for name, tensor in node.weights("dense", "A").items()})
    torch.cuda.empty_cache()
    assert free[1] - free[-1] < 64 << 20, "one is kept, not one of each push"
    assert torch.cuda.mem_get_info()[0] - free[-1] > 192 << 20, "and none after a push through slots"


def test_engines_on_gpus_generate_what_engines_on_a_cpu_do(node):
    engine = node.fleet.start_engine("cpu", node.fleet.root / "dense-B", tp=1)
    node.push("dense", node.weights("dense", "B"))
    body = {"prompt_ids": [5, 6, 7], "max_tokens": 8}
    told = [
        httpx.post(f"{one.url}/generate", json=body, timeout=60, trust_env=False).raise_for_status().json()["token_ids"]
        for one in (engine, *node.engines["dense"])
    ]
    node.fleet.end(engine)
    assert all(tokens == told[0] for tokens in told)


def gpu_users() -> dict[int, int]:
    """MiB of GPU memory, by process."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return {int(pid): int(used) for pid, used in (line.split(",") for line in listed.splitlines() if line.strip())}


def maps_cuda(pid: int) -> bool:
    return "libcuda.so" in Path(f"/proc/{pid}/maps").read_text()


def test_the_daemon_has_no_cuda_context(node):
    node.push("dense", node.weights("dense", "A"))
    bridges = [bridge.pid for bridge in fetch_status(node.daemon.endpoint).bridges]
    assert all(pid is not None and maps_cuda(pid) for pid in bridges), "bridges do, or this test shows nothing"
    assert not maps_cuda(node.daemon.pid)


@pytest.mark.parametrize("which", ["bridge", "worker"])
def test_what_is_killed_frees_its_memory_and_the_next_push_works(node, which, gpus):
    """A bridge between pushes, an engine's worker (which takes its engine along)."""
    weights = {n: w.cuda() for n, w in node.weights("dense", "B").items()}
    node.push("dense", weights)
    engine = node.engines["dense"][1]
    status = fetch_status(node.daemon.endpoint)
    if which == "bridge":
        victim = status.bridges[-1].pid
    else:
        info = httpx.get(f"{engine.url}/info", trust_env=False).json()
        victim = info["worker_pids"][-1]
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    assert eventually(lambda: victim not in gpu_users(), seconds=20)
    if which == "worker":
        engine.wait(30)
        node.fleet.restart_engine(engine)
    assert eventually(lambda: all(b.pid for b in fetch_status(node.daemon.endpoint).bridges), seconds=20)

    def again() -> bool:
        try:
            node.push("dense", weights)
        except (WeightSyncError, AssertionError):
            return False
        return True

    assert eventually(again, seconds=60)
    node.assert_holds("dense", node.weights("dense", "B"), next(node.versions) - 1)


def test_pushes_leave_nothing_behind(node):
    """GPU memory of every process after push 12 is what it was after push 2, and the ledger is even."""
    weights = {n: w.cuda() for n, w in node.weights("moe", "B").items()}
    for _ in range(2):
        node.push("moe", weights)
    torch.cuda.synchronize()
    before, allocated = gpu_users(), torch.cuda.memory_allocated()
    shm = sorted(path.name for path in Path("/dev/shm").iterdir())
    for _ in range(10):
        node.push("moe", weights)
    assert gpu_users() == before
    assert torch.cuda.memory_allocated() == allocated
    assert sorted(path.name for path in Path("/dev/shm").iterdir()) == shm
    assert sum(bridge.outstanding for bridge in fetch_status(node.daemon.endpoint).bridges) == 0


@pytest.mark.parametrize("trial", ["hasty", "fenced"])
def test_the_fence_keeps_slow_readers_and_fast_fillers_apart(node, trial):
    """Readers that dawdle at random, one slot: with the fence no bucket differs; without it some do."""
    fleet = node.fleet
    order = {"slow": 0.02, "hasty": trial == "hasty"}
    engine = fleet.start_engine(
        trial, fleet.root / "dense-A", tp=2, device="cuda", flags=["--trial", json.dumps(order)]
    )
    daemon = fleet.start_daemon(
        f"race{trial}", [engine], arena={"slot_bytes": "256KiB", "slots": 1}, timeouts={"operation": 20.0}
    )
    sent = [{n: w.cuda() for n, w in node.weights("dense", name).items()} for name in "AB"]
    failures = 0
    for version in range(1, 21):
        try:
            report = push_weights(sent[version % 2], version=version, daemon=daemon.endpoint, timeout=60)
            failures += not report.complete
        except WeightSyncError:
            failures += 1
    fleet.end(daemon)
    fleet.end(engine)
    assert (failures > 0) == (trial == "hasty"), f"{failures} of 20 pushes failed"
