"""Real megatron-core ranks on GPUs, over NCCL, push their parts into reference engines on the same GPUs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from tests.gpu.kit import Node, needs, serving
from weightsync.adapters.reference.config import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]

DENSE = ModelConfig(
    vocab_size=259,  # odd, so that all pad
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    dtype="bfloat16",
)
MOE = msgspec.structs.replace(
    DENSE,
    architecture="Qwen3MoeForCausalLM",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
)
# how the ranks are cut, and how many there are
DENSE_CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"tp": 2}, 2),
    ({"tp": 2, "masters": True}, 2),
    ({"pp": 2}, 2),
    ({"pp": 2, "vp": 2}, 2),
    ({"tp": 2, "pp": 2}, 4),
]
MOE_CASES: list[tuple[dict[str, Any], int]] = [
    ({"ep": 2}, 2),
    ({"tp": 2, "ep": 2, "like_te": True}, 2),
    ({"tp": 2, "pp": 2, "ep": 2}, 4),
    ({"tp": 2, "ep": 2, "etp": 2, "like_te": True}, 4),
]


def label(value: Any) -> str:
    """A case's name, and behind it the number of ranks: `tp2-pp2-on4`."""
    if isinstance(value, int):
        return f"on{value}"
    return "-".join(f"{key}{size if size is not True else ''}" for key, size in value.items()) or "whole"


@pytest.fixture(scope="module")
def dense() -> Iterator[Node]:
    with serving(DENSE, "cuda") as node:
        yield node


@pytest.fixture(scope="module")
def experts() -> Iterator[Node]:
    with serving(MOE, "cuda") as node:
        yield node


def push(node: Node, case: dict[str, Any], ranks: int, out: Path) -> None:
    """Ranks push checkpoint B, then B with one added to every weight."""
    last, told = node.pushed("megatron_push.py", ranks, case, out)
    node.assert_holds({name: weight + 1 for name, weight in node.weights("B").items()}, last)
    assert [report["complete"] for report in told] == [True, True]
    assert {e["checked"] for report in told for e in report["engines"]} == {len(node.weights("B"))}


def push_steps(node: Node, ranks: int, out: Path) -> None:
    """Replicas push checkpoint B, then what a step of Megatron's distributed optimizer makes of it."""
    from tests.gpu.megatron_push import LR

    last, told = node.pushed("megatron_push.py", ranks, {"optimiser": True}, out)
    wanted = {}
    for name, weight in node.weights("B").items():
        master = weight.to(node.device).float()
        master.grad = torch.ones_like(master)
        torch.optim.AdamW([master], lr=LR, weight_decay=0.0).step()
        wanted[name] = master.to(weight.dtype).cpu()
        assert not torch.equal(wanted[name], weight)
    node.assert_holds(wanted, last)
    assert [report["complete"] for report in told] == [True, True]


@pytest.mark.parametrize(("case", "ranks"), DENSE_CASES, ids=label)
def test_ranks_push_their_parts(dense, case, ranks, gpus, tmp_path):
    needs(ranks, gpus)
    push(dense, case, ranks, tmp_path)


@pytest.mark.parametrize(("case", "ranks"), MOE_CASES, ids=label)
def test_ranks_push_their_experts(experts, case, ranks, gpus, tmp_path):
    needs(ranks, gpus)
    push(experts, case, ranks, tmp_path)


def test_ranks_push_what_the_distributed_optimizer_made(dense, gpus, tmp_path):
    needs(2, gpus)
    push_steps(dense, 2, tmp_path)
