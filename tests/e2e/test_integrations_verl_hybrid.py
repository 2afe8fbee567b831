"""verl's server adapters in hybrid mode, looked up as its actor workers do it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from weightsync.errors import SourceError

pytest.importorskip("verl", reason="verl is not installed (it needs ray, transformers, tensordict; over 700 MB)")

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def adapter_class(monkeypatch):
    """What verl gets for rollout.name=vllm once it has imported `model.external_lib`.

    verl's adapter needs no vLLM itself, but verl wants it installed: those two checks are answered for it.
    """
    from verl.utils.import_utils import import_external_libs
    from verl.workers.rollout import base

    there = ModuleType("verl.third_party.vllm")
    there.__dict__["VLLM_SLEEP_LEVEL"] = 2
    monkeypatch.setitem(sys.modules, there.__name__, there)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.24.0" if name == "vllm" else version(name))
    before = dict(base._ROLLOUT_REGISTRY)
    import_external_libs("weightsync.integrations.verl_hybrid")
    try:
        yield base.get_rollout_class("vllm", "async")
    finally:
        base._ROLLOUT_REGISTRY.update(before)
        sys.modules.pop("weightsync.integrations.verl_hybrid")


class Server:
    """Of verl's vLLM server, an actor, what its adapter asks for after an update."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.set_global_steps = SimpleNamespace(remote=self._set)

    async def _set(self, step: int) -> None:
        self.steps.append(step)


def adapter(adapter_class, node) -> Any:
    made = adapter_class.__new__(adapter_class)
    options = {"weightsync": {"daemon": node.daemon.endpoint, "timeout": 60}}
    made.config = SimpleNamespace(checkpoint_engine=SimpleNamespace(engine_kwargs=options))
    made.server_handle, made.use_shm, made._has_server = Server(), False, True
    return made


def test_full_weights_are_pushed_and_verls_own_adapter_sets_the_step(adapter_class, node):
    from verl.workers.rollout.vllm_rollout import ServerAdapter

    assert issubclass(adapter_class, ServerAdapter)
    assert not inspect.isabstract(adapter_class)
    made = adapter(adapter_class, node)
    for step, name in enumerate("BA", start=3):
        weights = iter(node.weights(name).items())
        asyncio.run(made.update_weights(weights, peft_config=None, base_sync_done=True, global_steps=step))
        node.assert_holds(node.weights(name), node.info(node.engines[0])["weight_version"])
    assert made.server_handle.steps == [3, 4]


def test_a_lora_adapter_alone_is_refused(adapter_class, node):
    with pytest.raises(SourceError, match="LoRA adapter"):
        asyncio.run(adapter(adapter_class, node).update_weights(iter(()), peft_config=object()))
