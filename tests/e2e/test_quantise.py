"""Weights quantised on their way into engines that serve an fp8 checkpoint: those hold it bit for bit, and compute."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import httpx
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import TINY, Node, get
from tests.e2e.test_commands import run
from tests.own import named
from tests.quantise_kit import quantised_whole
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import write_config
from weightsync.adapters.reference.model import greedy, load_checkpoint
from weightsync.adapters.reference.ops import dequantised
from weightsync.errors import PushAborted, PushRefused
from weightsync.fleet import Fleet
from weightsync.sources import CheckpointSource, Fp8

pytestmark = pytest.mark.e2e

BLOCK = (16, 16)
PROMPT = [5, 17, 211]


def as_fp8(weights):
    """What an fp8 checkpoint of these weights has."""
    return quantised_whole(weights, [name for name in weights if name.endswith("_proj.weight")], BLOCK)


@pytest.fixture(scope="module")
def node():
    with Fleet() as fleet:
        for seed, name in enumerate("ABC"):
            random_checkpoint(TINY, fleet.root / name, seed)
        quantised = msgspec.structs.replace(TINY, weight_block_size=BLOCK)
        served = fleet.root / "A-fp8"
        served.mkdir()
        save_file(as_fp8(load_file(fleet.root / "A/model.safetensors")), served / "model.safetensors")
        write_config(quantised, served)
        engines = [fleet.start_engine(f"e{tp}", served, tp=tp, wait=False) for tp in (1, 2)]
        for engine in engines:
            fleet.wait_engine(engine)
        daemon = fleet.start_daemon(named("node0"), engines, arena={"slot_bytes": "64KiB", "slots": 2})
        yield Node(fleet, daemon, engines, quantised, itertools.count(1))


def assert_serves(node, name: str, version: int) -> None:
    """The engines hold the checkpoint, quantised, and generate what its rounded weights generate."""
    sent = as_fp8(node.weights(name))
    node.assert_holds(sent, version)
    model = load_checkpoint(node.checkpoint(name))
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            if f"{weight}_scale_inv" in sent:
                parameter.copy_(dequantised(sent[weight], sent[f"{weight}_scale_inv"], BLOCK))
    wanted = greedy(model, PROMPT, 8)
    for engine in node.engines:
        body = {"prompt_ids": PROMPT, "max_tokens": 8}
        answer = httpx.post(f"{engine.url}/generate", json=body, timeout=30, trust_env=False).raise_for_status().json()
        assert answer["token_ids"] == wanted, engine.name


def test_a_module_a_mapping_and_a_checkpoint(node):
    like, daemon = node.checkpoint("A-fp8"), node.daemon.endpoint
    rule = Fp8(BLOCK)
    with CheckpointSource(node.checkpoint("A")) as stored:
        pushes = [
            ("B", load_checkpoint(node.checkpoint("B")), like),
            ("A", stored, rule),
            ("C", node.weights("C"), Fp8.like(like)),
        ]
        for name, weights, quantise in pushes:
            version = next(node.versions)
            report = push_weights(weights, version=version, daemon=daemon, timeout=30, quantise=quantise)
            assert report.complete, str(report)
            assert report.bytes == sum(tensor.nbytes for tensor in as_fp8(node.weights(name)).values())
            assert_serves(node, name, version)


def test_the_command(node):
    version = next(node.versions)
    how = ["--version", str(version), "--quantise", node.checkpoint("A-fp8")]
    done = run("weightsync", "push", node.checkpoint("B"), *how, node=node)
    assert done.returncode == 0, done.stderr
    assert_serves(node, "B", version)


def test_what_engines_do_not_serve_as_float8_is_refused_by_them(node):
    before = [node.info(engine)["weight_version"] for engine in node.engines]
    for quantise, words in ((None, "dtype float32, but"), (Fp8(BLOCK, ()), "no such tensor"), (Fp8(), "shape")):
        with pytest.raises(PushRefused, match=words):
            push_weights(node.weights("B"), version=99, daemon=node.daemon.endpoint, timeout=30, quantise=quantise)
    assert [node.info(engine)["weight_version"] for engine in node.engines] == before


def test_a_number_that_is_none_is_refused_before_anything_is_touched(node):
    weights = node.weights("C")
    push_weights(
        weights, version=next(node.versions), daemon=node.daemon.endpoint, timeout=30, quantise=node.checkpoint("A-fp8")
    )
    held = [get(f"{engine.url}/checksums").json() for engine in node.engines]
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("inf")
    with pytest.raises(PushAborted, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has a NaN or an infinity"):
        push_weights(weights, version=99, daemon=node.daemon.endpoint, timeout=30, quantise=node.checkpoint("A-fp8"))
    assert [get(f"{engine.url}/checksums").json() for engine in node.engines] == held
    assert not any(node.info(engine)["torn"] for engine in node.engines)


def test_ranks_that_share_blocks(node, tmp_path):
    version = next(node.versions)
    script = Path(__file__).with_name("quantise_push.py")
    arguments = [node.checkpoint("B"), node.checkpoint("A-fp8"), node.daemon.endpoint, str(version), str(tmp_path)]
    trainer = node.fleet.torchrun("fsdp2", script, 3, arguments)
    assert trainer.wait(150) == 0, trainer.tail(60)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    for case, words in (("alone", "lie on several ranks"), ("nan", "up_proj.weight' has a NaN or an infinity")):
        assert {one[case][0] for one in told} == {"PushAborted"}, told
        assert all(words in one[case][1] for one in told), told
    assert [one["whole"] for one in told] == [[True, ["committed", "committed"]]] * 3
    assert_serves(node, "B", version)
