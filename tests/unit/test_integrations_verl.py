"""The checkpoint engine in verl's own registry, and what it needs of verl."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

pytest.importorskip("verl", reason="verl is not installed (it needs ray, transformers, tensordict; over 700 MB)")

pytestmark = pytest.mark.filterwarnings("ignore")  # verl's own and ray's


@pytest.fixture
def registry():
    from verl.checkpoint_engine.base import CheckpointEngineRegistry
    from verl.utils.import_utils import import_external_libs

    import_external_libs("weightsync.integrations.verl")  # what verl does with custom_backend_module
    return CheckpointEngineRegistry


def test_verl_finds_and_makes_it(registry):
    engine = registry.new("weightsync", bucket_size=1 << 20, is_master=True, model="policy", timeout=30)
    assert not inspect.isabstract(type(engine))
    assert engine.prepare() == {}
    assert list(engine.receive_weights(global_steps=1)) == []


def test_it_takes_the_arguments_that_verls_base_class_declares(registry):
    from verl.checkpoint_engine.base import CheckpointEngine

    ours = registry.get("weightsync")
    for name in ("prepare", "build_topology", "finalize", "send_weights", "receive_weights"):
        declared = list(inspect.signature(getattr(CheckpointEngine, name)).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters) == declared, name


def test_replicas_are_named_as_engines(registry):
    from weightsync.integrations.verl import engines_of

    replicas = [SimpleNamespace(replica_rank=i, server_address=f"10.0.0.{i}:3000{i}") for i in range(2)]
    found = engines_of(replicas, "vllm", model="policy")
    assert [(e.name, e.kind, e.url, e.model) for e in found] == [
        ("verl-0", "vllm", "http://10.0.0.0:30000", "policy"),
        ("verl-1", "vllm", "http://10.0.0.1:30001", "policy"),
    ]
