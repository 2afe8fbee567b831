"""Models as trainers shard and wrap them, pushed into real engines: each holds the checkpoint's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest

from tests.e2e.test_commands import run
from weightsync import push_weights
from weightsync.adapters.reference.oracle import expected_checksums

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).with_name("module_push.py")


def test_fsdp1_hsdp_and_some_of_ddp(node):
    out = node.fleet.root / "modules"
    out.mkdir()
    a, b = node.checkpoint("A"), node.checkpoint("B")
    version, *_ = (next(node.versions) for _ in range(4))
    urls = [engine.url for engine in node.engines]
    arguments = [a, b, node.daemon.endpoint, str(version), str(out), *urls]
    env = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": uuid4().hex}
    trainer = node.fleet.spawn("trainer", (str(SCRIPT), *arguments), env=env)
    assert trainer.wait(150) == 0, f"{trainer.tail(60)}\n{node.daemon.tail(30)}"
    held = json.loads((out / "held.json").read_text())
    one, other = node.weights("A"), node.weights("B")
    of_both = other | {name: tensor for name, tensor in one.items() if name.startswith("model.layers.0.")}
    expected = {"masters": other, "flat hybrid": one, "fsdp2 hybrid": other, "some": of_both}
    assert held.keys() == expected.keys()
    for case, weights in expected.items():
        assert held[case]["complete"], case
        for engine, sums in zip(node.engines, held[case]["sums"], strict=True):
            assert sums == expected_checksums(node.config, weights, engine.tp), (case, engine.name)
    node.assert_holds(of_both, version + 3)


def test_some_tensors_of_a_checkpoint_directory(node):
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    push_all(node, "A")
    version = next(node.versions)
    how = ["--only", "model.layers.1.*", "--only", up, "--rename", f"{up}={gate}"]
    done = run("weightsync", "push", node.checkpoint("B"), "--version", str(version), *how, node=node)
    assert done.returncode == 0, done.stderr
    other = node.weights("B")
    sent = {name: tensor for name, tensor in other.items() if name.startswith("model.layers.1.")} | {gate: other[up]}
    node.assert_holds(node.weights("A") | sent, version)


def push_all(node, name: str) -> None:
    push_weights(node.weights(name), version=next(node.versions), daemon=node.daemon.endpoint, timeout=30)
