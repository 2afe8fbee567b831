"""Real megatron-core ranks push through a real daemon into real engines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator  # noqa: TC003 - fixtures' types
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e.conftest import TINY, Node
from tests.marks import slow
from tests.own import named
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import ModelConfig
from weightsync.fleet import Fleet

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]

ROOT = Path(__file__).parents[2]
MOE = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=259,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
)


@pytest.fixture(scope="module")
def experts() -> Iterator[Node]:
    """A node with one engine of experts."""
    with Fleet() as fleet:
        for seed, name in enumerate("AB"):
            random_checkpoint(MOE, fleet.root / name, seed)
        engine = fleet.start_engine("moe", fleet.root / "A", tp=2)
        daemon = fleet.start_daemon(named("node-moe"), [engine], arena={"slot_bytes": "256KiB", "slots": 2})
        yield Node(fleet, daemon, [engine], MOE, itertools.count(1))


def push(node: Node, sizes: dict[str, int], ranks: int, out: Path) -> None:
    """Ranks push checkpoint B, then B with one added to every weight, and all hear the same."""
    script = Path(__file__).with_name("megatron_push.py")
    first, second = next(node.versions), next(node.versions)
    arguments = [node.checkpoint("B"), node.daemon.endpoint, str(first), str(out), json.dumps(sizes)]
    name = "megatron-" + "-".join(f"{cut}{size}" for cut, size in sizes.items())
    trainer = node.fleet.torchrun(name, script, ranks, arguments, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}"})
    assert trainer.wait(150) == 0, trainer.tail(60)
    node.assert_holds({name: weight + 1 for name, weight in node.weights("B").items()}, second)
    told = [json.loads((out / f"rank{r}.json").read_text()) for r in range(ranks)]
    assert all(t == told[0] for t in told), "every rank gets the same report"
    assert [r["complete"] for r in told[0]] == [True, True]
    assert {e["checked"] for r in told[0] for e in r["engines"]} == {len(node.weights("B"))}


@pytest.mark.parametrize(
    ("sizes", "ranks"), [slow({"tp": 2}, 2), ({"tp": 2, "pp": 2}, 4)], ids=lambda value: json.dumps(value)
)
def test_megatron_ranks_push_their_parts(node, sizes, ranks, tmp_path):
    assert node.config is TINY
    push(node, sizes, ranks, tmp_path)


def test_megatron_ranks_push_their_experts(experts, tmp_path):
    push(experts, {"tp": 2, "ep": 2}, 2, tmp_path)
