"""Weights on GPUs, quantised to float8 there on their way into engines: bit for bit what a CPU makes of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gpu.kit import Node, needs, serving
from tests.gpu.test_push import DENSE
from tests.quantise_kit import quantised_whole, sent
from weightsync import push_weights
from weightsync.adapters.reference.config import ModelConfig, write_config
from weightsync.sources import CheckpointSource, Fp8

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.timeout(240), pytest.mark.e2e]

Block = tuple[int, int]
BLOCK: Block = (32, 16)
SHARED: Block = (64, 16)  # of 64 rows of k_proj, a rank of two has 32
CASES = ("there", "masters", "strided", "host", "checkpoint")


def as_fp8(weights: dict[str, torch.Tensor], block: Block = BLOCK) -> dict[str, torch.Tensor]:
    """What an fp8 checkpoint of these weights has, made on the CPU, block by block."""
    return quantised_whole(weights, [name for name in weights if name.endswith("_proj.weight")], block)


def prepared(root: Path, block: Block = BLOCK) -> tuple[ModelConfig, Path]:
    """Checkpoint A in float8, for engines to serve."""
    config, served = msgspec.structs.replace(DENSE, weight_block_size=block), root / "A-fp8"
    served.mkdir()
    save_file(as_fp8(load_file(root / "A/model.safetensors"), block), served / "model.safetensors")
    write_config(config, served)
    return config, served


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """Engines and slots on GPUs."""
    with serving(DENSE, "cuda", prepare=prepared) as node:
        yield node


@pytest.fixture(scope="module")
def on_host() -> Iterator[Node]:
    """An engine and slots in host memory."""
    with serving(DENSE, "cpu", tps=(2,), prepare=prepared) as node:
        yield node


@pytest.fixture(scope="module")
def of_shared() -> Iterator[Node]:
    """An engine whose blocks lie on several trainer ranks; tensor parallelism would cut them too."""
    with serving(DENSE, "cuda", tps=(1,), prepare=partial(prepared, block=SHARED)) as node:
        yield node


def push(node: Node, device: str, kind: str) -> None:
    """Push checkpoints B and A from a device, or from where `kind` says."""
    recipe: Any = node.checkpoint("A-fp8") if kind == "there" else Fp8(BLOCK)
    for name in "BA":
        whole = node.weights(name)
        weights: Any = {n: w.to(device) for n, w in whole.items()}
        options: dict[str, Any] = {}
        if kind == "masters":
            weights = {n: w.float() * 1.01 for n, w in weights.items()}
            whole = {n: w.cpu().bfloat16() for n, w in weights.items()}
            options = {"dtype": "bfloat16"}
        elif kind == "strided":
            weights = {n: w.t().contiguous().t() if w.ndim == 2 else w for n, w in weights.items()}
        elif kind == "host":
            weights = whole
        elif kind == "checkpoint":
            weights = CheckpointSource(node.checkpoint(name))
        version = next(node.versions)
        report = push_weights(
            weights, version=version, daemon=node.daemon.endpoint, timeout=60, quantise=recipe, **options
        )
        assert report.complete, str(report)
        made = as_fp8(whole)
        assert report.bytes == sum(tensor.nbytes for tensor in made.values())
        node.assert_holds(made, version)


def push_ranks(node: Node, out: Path) -> None:
    """Shards of FSDP2, which end within blocks: ranks take the greatest magnitudes in a collective."""
    last, told = node.pushed("trainer_push.py", 2, "fsdp2", out, node.checkpoint("A-fp8"))
    node.assert_holds(as_fp8(load_file(out / "whole.safetensors"), SHARED), last)
    assert [report["complete"] for report in told] == [True, True]


def extremes(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a 16-bit type, or as many of float32, from all of its range: 256 x 256."""
    words = torch.arange(1 << 16, dtype=torch.int32)
    found = (words * 65537).view(dtype) if dtype == torch.float32 else words.to(torch.int16).view(dtype)
    shuffled = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    return torch.where(shuffled.isfinite(), shuffled, torch.zeros_like(shuffled)).view(256, 256)


def compare(device: str, dtype: torch.dtype, block: tuple[int, int] | None, ue8m0: bool) -> None:
    """What a source sends of weights on a device is what one sends of the same on the CPU."""
    whole = extremes(dtype)
    ordered = whole.flatten().abs().sort().values.view(256, 256)  # blocks of like magnitudes, down to nothing
    rows = {"all.weight": whole, "ordered.weight": ordered, "odd.weight": ordered[3:, 5:], "none.weight": whole * 0}
    recipe = Fp8(block, ue8m0=ue8m0)
    here = sent(rows, recipe)
    there = sent({name: weight.to(device) for name, weight in rows.items()}, recipe)
    assert here.keys() == there.keys()
    assert len(here) == 2 * len(rows)
    for name, tensor in here.items():
        other = there[name]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (33, 7), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_quantises_as_a_cpu_does(dtype, block, ue8m0):
    compare("cuda", dtype, block, ue8m0)


@pytest.mark.parametrize("kind", CASES)
def test_weights_are_quantised_into_slots_on_gpus(node, kind):
    push(node, "cuda", kind)


@pytest.mark.parametrize("kind", ["there", "masters", "strided"])
def test_weights_on_a_gpu_are_quantised_into_slots_in_host_memory(on_host, kind):
    push(on_host, "cuda", kind)


def test_ranks_that_share_blocks(of_shared, gpus, tmp_path):
    needs(2, gpus)
    push_ranks(of_shared, tmp_path)
